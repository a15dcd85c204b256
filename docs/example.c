// Opens a model, prunes it, and lets it answer: what a program in C does with flapjack. Ctrl-C calls off what is under way.
//
// usage: example MODEL.gguf RATIO PROMPT        (a model of "" is the default one)

#include <flapjack.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

static volatile sig_atomic_t interrupted;

static void interrupt(int number) {
  (void)number;
  interrupted = 1;
}

static int on_progress(const char *stage, uint64_t done, uint64_t total, void *data) {
  (void)data;
  fprintf(stderr, "%s: %llu of %llu\n", stage, (unsigned long long)done, (unsigned long long)total);
  return interrupted; // anything but 0 calls it off
}

static int on_text(const char *text, size_t length, void *data) {
  fwrite(text, 1, length, data);
  fflush(data);
  return interrupted; // anything but 0 ends the answer
}

static int prune(FlapjackModel *model, double ratio) {
  FlapjackPruneOptions options;
  flapjack_prune_options_default(&options, sizeof options);
  options.target = FLAPJACK_TARGET_RATIO;
  options.amount = ratio;
  FlapjackPruneReport report;
  if (flapjack_prune(model, &options, on_progress, NULL, &report, sizeof report) != FLAPJACK_STATUS_OK)
    return -1;
  fprintf(stderr, "%.1f %% of the layers' weights are gone: %llu bytes, %llu before\n", 100 * report.removed,
          (unsigned long long)report.bytes_after, (unsigned long long)report.bytes_before);
  return 0;
}

static int answer(FlapjackModel *model, const char *prompt) {
  FlapjackInfo info;
  if (flapjack_info(model, &info, sizeof info) != FLAPJACK_STATUS_OK)
    return -1;
  FlapjackGenerateOptions options;
  flapjack_generate_options_default(model, &options, sizeof options);
  options.max_tokens = 64;
  FlapjackAnswer numbers;
  FlapjackStatus status;
  if (info.chat) { // it is asked, as its chat template has it
    FlapjackConversation *conversation;
    status = flapjack_conversation_new(model, NULL, &conversation);
    if (status == FLAPJACK_STATUS_OK)
      status = flapjack_conversation_say(conversation, prompt, &options, on_text, stdout, &numbers, sizeof numbers);
    flapjack_conversation_free(conversation);
  } else { // it goes on with the text as it stands
    status = flapjack_generate(model, prompt, &options, on_text, stdout, &numbers, sizeof numbers);
  }
  if (status != FLAPJACK_STATUS_OK)
    return -1;
  printf("\n");
  fflush(stdout);
  fprintf(stderr, "%llu tokens in %.2f s\n", (unsigned long long)numbers.tokens, numbers.seconds);
  return 0;
}

int main(int argc, char **argv) {
  if (argc != 4) {
    fprintf(stderr, "usage: %s MODEL.gguf RATIO PROMPT\n", argv[0]);
    return 2;
  }
  signal(SIGINT, interrupt);
  const char *path = argv[1][0] ? argv[1] : NULL;
  FlapjackModel *model;
  FlapjackStatus status = flapjack_open(path, NULL, on_progress, NULL, &model);
  int failed = status != FLAPJACK_STATUS_OK || prune(model, atof(argv[2])) || answer(model, argv[3]);
  if (failed)
    fprintf(stderr, "error: %s\n", flapjack_last_error());
  flapjack_free(model);
  return failed;
}
