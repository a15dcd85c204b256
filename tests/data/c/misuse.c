// Uses the interface as it must not be used, or only just may be, and looks whether it is told so in words.
//
// usage: misuse MODEL.gguf CACHE            (the model has a chat template)

#include <flapjack.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                                               \
  do {                                                                                                                 \
    if (!(condition)) {                                                                                                \
      fprintf(stderr, "line %d: %s; the last error is: %s\n", __LINE__, #condition, flapjack_last_error());            \
      exit(1);                                                                                                         \
    }                                                                                                                  \
  } while (0)
#define REFUSED(call, status, words)                                                                                   \
  do {                                                                                                                 \
    CHECK((call) == FLAPJACK_STATUS_##status);                                                                         \
    CHECK(strstr(flapjack_last_error(), words) != NULL);                                                               \
  } while (0)

static FlapjackModel *model;
static FlapjackConversation *conversation;

static FlapjackModel *open_model(const char *path, const char *cache) {
  FlapjackOpenOptions options;
  flapjack_open_options_default(&options, sizeof options);
  options.threads = 2;
  options.cache_folder = cache;
  FlapjackModel *opened;
  CHECK(flapjack_open(path, &options, NULL, NULL, &opened) == FLAPJACK_STATUS_OK);
  return opened;
}

static void nulls(const char *path) {
  FlapjackModel *none = (FlapjackModel *)&none;
  FlapjackConversation *no_conversation = (FlapjackConversation *)&none;
  char *json = (char *)&json;
  REFUSED(flapjack_open(path, NULL, NULL, NULL, NULL), ARGUMENT, "NULL");
  REFUSED(flapjack_open("there/is/none.gguf", NULL, NULL, NULL, &none), FILE, "there/is/none.gguf");
  CHECK(none == NULL);
  REFUSED(flapjack_info(NULL, NULL, 0), ARGUMENT, "NULL");
  REFUSED(flapjack_report_json(NULL, &json), ARGUMENT, "the model is NULL");
  CHECK(json == NULL);
  REFUSED(flapjack_report_json(NULL, NULL), ARGUMENT, "NULL");
  REFUSED(flapjack_prune(NULL, NULL, NULL, NULL, NULL, 0), ARGUMENT, "the model is NULL");
  REFUSED(flapjack_reopen(NULL), ARGUMENT, "the model is NULL");
  REFUSED(flapjack_export(NULL, NULL, NULL, NULL), ARGUMENT, "the model is NULL");
  REFUSED(flapjack_generate(NULL, NULL, NULL, NULL, NULL, NULL, 0), ARGUMENT, "the model is NULL");
  REFUSED(flapjack_conversation_new(NULL, NULL, &no_conversation), ARGUMENT, "the model is NULL");
  CHECK(no_conversation == NULL);
  REFUSED(flapjack_conversation_new(NULL, NULL, NULL), ARGUMENT, "NULL");
  REFUSED(flapjack_conversation_say(NULL, NULL, NULL, NULL, NULL, NULL, 0), ARGUMENT, "the conversation is NULL");
  REFUSED(flapjack_conversation_reset(NULL), ARGUMENT, "the conversation is NULL");
  REFUSED(flapjack_conversation_set_system(NULL, NULL), ARGUMENT, "the conversation is NULL");
  flapjack_open_options_default(NULL, 0);
  flapjack_prune_options_default(NULL, 100);
  flapjack_generate_options_default(NULL, NULL, 0);
  flapjack_cancel(NULL);
  flapjack_free(NULL);
  flapjack_conversation_free(NULL);
  flapjack_string_free(NULL);
  REFUSED(flapjack_generate(model, NULL, NULL, NULL, NULL, NULL, 0), ARGUMENT, "the prompt is NULL");
  REFUSED(flapjack_export(model, NULL, NULL, NULL), ARGUMENT, "the path is NULL");
  REFUSED(flapjack_conversation_say(conversation, NULL, NULL, NULL, NULL, NULL, 0), ARGUMENT, "the message is NULL");
}

static void nonsense(void) {
  REFUSED(flapjack_generate(model, "caf\xe9", NULL, NULL, NULL, NULL, 0), ARGUMENT, "offset 3");
  FlapjackGenerateOptions generate;
  flapjack_generate_options_default(model, &generate, sizeof generate);
  generate.temperature = -1;
  REFUSED(flapjack_generate(model, "a", &generate, NULL, NULL, NULL, 0), ARGUMENT, "temperature");
  flapjack_generate_options_default(NULL, &generate, sizeof generate);
  generate.json_schema = "{";
  REFUSED(flapjack_generate(model, "a", &generate, NULL, NULL, NULL, 0), ARGUMENT, "JSON");
  memset(&generate, 0, sizeof generate);
  REFUSED(flapjack_generate(model, "a", &generate, NULL, NULL, NULL, 0), ARGUMENT, "flapjack_generate_options_default");

  FlapjackPruneOptions prune;
  const double amounts[] = {-0.1, 0.9, 1e300, 0.0 / 0.0};
  for (size_t i = 0; i < sizeof amounts / sizeof *amounts; i++)
    for (int target = FLAPJACK_TARGET_RATIO; target <= FLAPJACK_TARGET_BYTES; target++) {
      flapjack_prune_options_default(&prune, sizeof prune);
      prune.method = "flap";
      prune.calibration_tokens = 512;
      prune.target = target;
      prune.amount = amounts[i];
      if (target == FLAPJACK_TARGET_RATIO)
        REFUSED(flapjack_prune(model, &prune, NULL, NULL, NULL, 0), ARGUMENT, "ratio");
      else if (!(prune.amount > 0))
        REFUSED(flapjack_prune(model, &prune, NULL, NULL, NULL, 0), ARGUMENT, "above 0");
    }
  prune.target = 77;
  REFUSED(flapjack_prune(model, &prune, NULL, NULL, NULL, 0), ARGUMENT, "77");
  prune.target = FLAPJACK_TARGET_BYTES;
  prune.amount = 1;
  REFUSED(flapjack_prune(model, &prune, NULL, NULL, NULL, 0), OUT_OF_REACH, "out of reach");
  prune.method = "shears";
  REFUSED(flapjack_prune(model, &prune, NULL, NULL, NULL, 0), ARGUMENT, "shears");
  FlapjackInfo info;
  CHECK(flapjack_info(model, &info, sizeof info) == FLAPJACK_STATUS_OK && !info.pruned && info.chat);
}

static int cancels(const char *stage, uint64_t done, uint64_t total, void *data) {
  (void)total;
  return strcmp(stage, data) == 0 && done > 0;
}

// Asks for more of the model while it is at work, and then frees it.
static int meddles(const char *text, size_t length, void *data) {
  int *calls = data;
  CHECK(strlen(text) == length);
  if ((*calls)++ > 0)
    return 1;
  FlapjackInfo info;
  REFUSED(flapjack_info(model, &info, sizeof info), BUSY, "in use");
  REFUSED(flapjack_generate(model, "a", NULL, NULL, NULL, NULL, 0), BUSY, "in use");
  REFUSED(flapjack_prune(model, NULL, NULL, NULL, NULL, 0), BUSY, "in use");
  REFUSED(flapjack_conversation_say(conversation, "a", NULL, NULL, NULL, NULL, 0), BUSY, "in use");
  REFUSED(flapjack_conversation_reset(conversation), BUSY, "in use");
  flapjack_free(model);
  flapjack_conversation_free(conversation);
  model = NULL;
  conversation = NULL;
  return 0;
}

int main(int argc, char **argv) {
  if (argc != 3)
    return 2;
  CHECK(flapjack_last_error()[0] == '\0');
  CHECK(flapjack_version()[0] != '\0');
  model = open_model(argv[1], argv[2]);
  CHECK(flapjack_conversation_new(model, "Be brief.", &conversation) == FLAPJACK_STATUS_OK);
  nulls(argv[1]);
  nonsense();

  FlapjackGenerateOptions generate;
  flapjack_generate_options_default(model, &generate, sizeof generate);
  generate.max_tokens = 8;
  CHECK(flapjack_conversation_say(conversation, "One", &generate, NULL, NULL, NULL, 0) == FLAPJACK_STATUS_OK);

  // Called off, before the model has changed and in the middle of it: it is as it was.
  FlapjackPruneOptions prune;
  flapjack_prune_options_default(&prune, sizeof prune);
  prune.method = "flap";
  prune.calibration_tokens = 600; // of so many there is no profile yet
  FlapjackInfo before, after;
  CHECK(flapjack_info(model, &before, sizeof before) == FLAPJACK_STATUS_OK);
  char *stages[] = {"calibrating", "pruning"};
  for (size_t i = 0; i < 2; i++) {
    REFUSED(flapjack_prune(model, &prune, cancels, stages[i], NULL, 0), CANCELLED, "cancelled");
    CHECK(flapjack_info(model, &after, sizeof after) == FLAPJACK_STATUS_OK);
    CHECK(!after.pruned && before.bytes == after.bytes);
  }
  CHECK(flapjack_prune(model, &prune, NULL, NULL, NULL, 0) == FLAPJACK_STATUS_OK);
  REFUSED(flapjack_prune(model, &prune, NULL, NULL, NULL, 0), STATE, "already");

  // A conversation of before goes on.
  CHECK(flapjack_conversation_say(conversation, "Two", &generate, NULL, NULL, NULL, 0) == FLAPJACK_STATUS_OK);
  char *json;
  CHECK(flapjack_report_json(model, &json) == FLAPJACK_STATUS_OK && strstr(json, "\"removed\"") != NULL);
  flapjack_string_free(json);

  // Freed while it is at work, by its own callback, and before the conversation.
  int calls = 0;
  FlapjackAnswer answer;
  generate.max_tokens = 1000;
  CHECK(flapjack_conversation_say(conversation, "Three", &generate, meddles, &calls, &answer, sizeof answer) ==
        FLAPJACK_STATUS_OK);
  CHECK(calls == 2 && answer.finish == FLAPJACK_FINISH_STOPPED && model == NULL);

  // A conversation keeps its model.
  model = open_model(argv[1], argv[2]);
  CHECK(flapjack_conversation_new(model, NULL, &conversation) == FLAPJACK_STATUS_OK);
  flapjack_free(model);
  generate.max_tokens = 8;
  CHECK(flapjack_conversation_say(conversation, "Four", &generate, NULL, NULL, &answer, sizeof answer) ==
        FLAPJACK_STATUS_OK);
  CHECK(answer.tokens > 0);
  flapjack_conversation_free(conversation);
  puts("all is well");
  return 0;
}
