// flapjack: runs LLaMA-family models on CPUs, and makes them smaller when they start. docs/library.md shows how to use this.
//
// Functions that can fail return a FlapjackStatus; flapjack_last_error() then says why, on the same thread.
// Texts are UTF-8 and end with a zero byte. Texts that are given are only read during the call.
// Structs of options are filled by their functions before they are changed, and the size of a struct goes with it:
// so a program works with later versions of the library, which may have more fields.
// A model, and a conversation, is used by one call at a time, on any thread. Callbacks may call any function, but those that
// need the model or the conversation of their own call return FLAPJACK_STATUS_BUSY. They must return: no longjmp(), no C++
// exceptions. Handles can be freed in any order.
//
// Made by cbindgen from src/ffi; do not edit. Make it anew with:
//     FLAPJACK_WRITE_HEADER=1 cargo test --test spec c_interface::the_header


#ifndef FLAPJACK_H
#define FLAPJACK_H

#include <stddef.h>
#include <stdint.h>

// What came of a call. Where it is not FLAPJACK_STATUS_OK, flapjack_last_error() says why, in words.
typedef enum {
  // It was done.
  FLAPJACK_STATUS_OK = 0,
  // A callback, or flapjack_cancel(), has called it off; the model is as it was.
  FLAPJACK_STATUS_CANCELLED = 1,
  // An argument is NULL, no UTF-8, or out of its range.
  FLAPJACK_STATUS_ARGUMENT = 2,
  // The model or the conversation is in use: by a call on another thread, or by the one whose callback this is.
  FLAPJACK_STATUS_BUSY = 3,
  // The model is not in a state for it: it has been pruned already, say, or has no chat template.
  FLAPJACK_STATUS_STATE = 4,
  // A file cannot be read or written, or is not what it should be.
  FLAPJACK_STATUS_FILE = 5,
  // There is not the memory for it.
  FLAPJACK_STATUS_MEMORY = 6,
  // The prompt does not fit in the context.
  FLAPJACK_STATUS_TOO_LONG = 7,
  // No ratio reaches the target of pruning.
  FLAPJACK_STATUS_OUT_OF_REACH = 8,
  // It failed in another way.
  FLAPJACK_STATUS_FAILED = 9,
  // There is a mistake in flapjack. The handles of this call can only be freed.
  FLAPJACK_STATUS_INTERNAL = 10,
} FlapjackStatus;

// What pruning is to reach.
typedef enum {
  // A share of the layers' weights that goes, at least 0 and below 0.9.
  FLAPJACK_TARGET_RATIO = 0,
  // Bytes that all weights may have.
  FLAPJACK_TARGET_BYTES = 1,
  // How many times as fast generation shall be.
  FLAPJACK_TARGET_SPEEDUP = 2,
  // A share by which the perplexity of held-back text may rise: 0.1 for a tenth.
  FLAPJACK_TARGET_PERPLEXITY_RISE = 3,
} FlapjackTarget;

// Why an answer ended.
typedef enum {
  // The model ended it, or what the JSON schema asks for is complete.
  FLAPJACK_FINISH_END = 0,
  // It has as many tokens as were asked for.
  FLAPJACK_FINISH_LENGTH = 1,
  // It came to a text that ends it.
  FLAPJACK_FINISH_STOP = 2,
  // The context is full.
  FLAPJACK_FINISH_CONTEXT_FULL = 3,
  // A callback, or flapjack_cancel(), ended it.
  FLAPJACK_FINISH_STOPPED = 4,
} FlapjackFinish;

// A conversation with a model. What was said is kept, and what the model has read of it is not read again.
typedef struct FlapjackConversation FlapjackConversation;

// A model that is open. One call at a time uses it, on whichever thread; another one then returns FLAPJACK_STATUS_BUSY.
typedef struct FlapjackModel FlapjackModel;

// How to open a model. flapjack_open_options_default() fills it.
typedef struct {
  // The size of this struct; filled by the function.
  size_t size;
  // Threads to compute with; 0 for one for each processor.
  uint32_t threads;
  // Anything but 0 rearranges the weights in memory, which is faster; 0 leaves their pages shared with the file.
  int32_t pack;
  // Tokens that a text, or a conversation, may have; 0 for as many as the model was trained for.
  uint64_t context;
  // The folder in which results of calibration and pruning are kept; NULL for the user's.
  const char *cache_folder;
} FlapjackOpenOptions;

// How far something long is: the name of its stage ("calibrating", "pruning" and others), and units that are done and in all, 0
// where nobody knows beforehand. Anything but 0 calls it off. It may be called on another thread than the caller's, but never
// by two at once.
typedef int (*FlapjackProgress)(const char *stage, uint64_t done, uint64_t total, void *data);

// What a model is now.
typedef struct {
  uint64_t parameters;
  // Bytes of all weights.
  uint64_t bytes;
  uint64_t layers;
  // Tokens of the vocabulary.
  uint64_t vocabulary;
  // Tokens that a text may have, as it was opened.
  uint64_t context;
  // Threads that it is computed with.
  uint32_t threads;
  // 1 if it has been pruned since it was opened, else 0.
  int32_t pruned;
  // 1 if it has a chat template, so that conversations are possible, else 0.
  int32_t chat;
  // Always 0.
  int32_t reserved;
} FlapjackInfo;

// How to prune. flapjack_prune_options_default() fills it.
typedef struct {
  // The size of this struct; filled by the function.
  size_t size;
  // What `amount` is, a number of FlapjackTarget: by default FLAPJACK_TARGET_RATIO.
  int32_t target;
  // Always 0.
  int32_t reserved;
  // How much of it; by default 0.3.
  double amount;
  // The method: "best", "flap", "wanda-sp" or "magnitude-sp"; NULL for the best one.
  const char *method;
  // How much time may be spent: "fast", "normal" or "best"; NULL for normal.
  const char *effort;
  // A text file, or a folder of them, to calibrate on; NULL for the built-in text.
  const char *calibration;
  // Tokens of it to use at most; 0 for what the effort asks for.
  uint64_t calibration_tokens;
  // Single weights that go, after heads and channels: "METHOD:SHARE" or "METHOD:N:M", such as "wanda:0.5" or "sparsegpt:2:4"; NULL for
  // none. With the ratio 0 they go alone.
  const char *sparse;
  // How these are shared out among the modules: "even" or "curves"; NULL for even.
  const char *allocate;
  // What becomes of projections that lose single weights: "sparse", which takes fewer bytes, and in files of flapjack_export() is for
  // flapjack alone; "zeros", which takes as many as before and is for all programs; "auto" or NULL for sparse, except for types that
  // this machine is slower with then.
  const char *sparse_form;
} FlapjackPruneOptions;

// What pruning did. flapjack_report_json() has more.
typedef struct {
  // The ratio that the target came to.
  double ratio;
  // The share of the layers' weights that is gone.
  double removed;
  // Parameters of the whole model.
  uint64_t parameters_before;
  uint64_t parameters_after;
  // Bytes of all weights.
  uint64_t bytes_before;
  uint64_t bytes_after;
  // What pruning took, without calibration and search.
  double seconds;
  // 1 if the outcome of an earlier run was taken from the cache folder, else 0.
  int32_t repeated;
  // Always 0.
  int32_t reserved;
} FlapjackPruneReport;

// Text as it becomes complete, of whole characters in UTF-8: `length` bytes, and a zero byte behind them. Anything but 0 ends the
// answer. It is called on the thread that asks.
typedef int (*FlapjackText)(const char *text, size_t length, void *data);

// How to generate. flapjack_generate_options_default() fills it.
typedef struct {
  // The size of this struct; filled by the function.
  size_t size;
  // Tokens to generate at most.
  uint64_t max_tokens;
  // The same seed gives the same text.
  uint64_t seed;
  // 0 always takes the most likely token.
  float temperature;
  // Chooses among the most likely tokens that together have this probability; 1 for all.
  float top_p;
  // Chooses among tokens of at least this share of the best one's probability; 0 for all.
  float min_p;
  // Makes tokens of the recent text less likely; 1 for not.
  float repetition_penalty;
  // Chooses among so many of the most likely tokens; 0 for all.
  uint64_t top_k;
  // Texts that end the answer, and behind the last one NULL; NULL for none.
  const char *const *stop;
  // A JSON schema that the answer is held to; NULL for none.
  const char *json_schema;
  // In conversations, gets what a reasoning model thinks before it answers, with the same data as the answer; NULL to leave it
  // out.
  FlapjackText on_reasoning;
} FlapjackGenerateOptions;

// An answer in numbers.
typedef struct {
  // Tokens of the prompt that were read. Of what was read for an earlier turn none are.
  uint64_t prompt_tokens;
  // Tokens that were generated.
  uint64_t tokens;
  double prompt_seconds;
  double seconds;
  // Messages of a conversation, from the oldest on, that the context has no more room for since this turn.
  uint64_t left_out;
  // A number of FlapjackFinish.
  int32_t finish;
  // Always 0.
  int32_t reserved;
} FlapjackAnswer;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Why the last call on this thread that was not done was not. Never NULL, and empty if all were done; valid until the next call
// on this thread.
const char *flapjack_last_error(void);

// The version of the library, such as "0.1.0". It is not to be freed.
const char *flapjack_version(void);

// Frees a text that a function of this library has given to be freed. NULL is let be.
void flapjack_string_free(char *text);

// Fills options for flapjack_open() with defaults. `size` is their size, as the caller knows it.
void flapjack_open_options_default(FlapjackOpenOptions *options, size_t size);

// Opens a model file (GGUF), a folder with safetensors files, or a model that is named: `org/repo:Q4_K_M` is one of the hub, which is
// downloaded once, `ollama:NAME` and `lmstudio:PUBLISHER/REPO` are those of other programs. Without a path (NULL) it is the default model,
// SmolLM2-135M-Instruct, which is downloaded once (98 MB).
// `options` may be NULL for the defaults, and `progress`, which tells of the download, for none. flapjack_free() frees the
// model; where it cannot be opened, `*model` is NULL.
FlapjackStatus flapjack_open(const char *path,
                             const FlapjackOpenOptions *options,
                             FlapjackProgress progress,
                             void *data,
                             FlapjackModel **model);

// Frees a model. Conversations with it keep what they need of it until they are freed too. NULL is let be.
void flapjack_free(FlapjackModel *model);

// Calls off what a call on another thread is doing with the model: pruning and writing to a file return
// FLAPJACK_STATUS_CANCELLED, an answer ends as far as it went. It does nothing else, and may be called by a handler of signals.
void flapjack_cancel(const FlapjackModel *model);

// Tells what a model is now. `size` is that of `*info`, as the caller knows it.
FlapjackStatus flapjack_info(const FlapjackModel *model, FlapjackInfo *info, size_t size);

// All that is known of a model, as JSON: "model" (what was opened, and how), "pruned" (what pruning did, null before) and "notices"
// (what may be worth knowing). flapjack_string_free() frees the text.
FlapjackStatus flapjack_report_json(const FlapjackModel *model,
                                    char **json);

// Fills options for flapjack_prune() with defaults. `size` is their size, as the caller knows it.
void flapjack_prune_options_default(FlapjackPruneOptions *options, size_t size);

// Prunes a model in place. `options` may be NULL for the defaults, `progress` and `report` for none; `size` is that of `*report`, as
// the caller knows it. The file stays as it is. Where pruning fails or is called off, the model is as it was. A model is
// pruned once; flapjack_reopen() comes before another time. Conversations go on, and read anew what was said.
FlapjackStatus flapjack_prune(FlapjackModel *model,
                              const FlapjackPruneOptions *options,
                              FlapjackProgress progress,
                              void *data,
                              FlapjackPruneReport *report,
                              size_t size);

// Opens the model's file again: the model is then as its file has it, whatever was done to it.
FlapjackStatus flapjack_reopen(FlapjackModel *model);

// Writes the model as it is now to a GGUF file, which llama.cpp runs too unless projections are sparse. `progress` may be NULL for none. What is at `path` is
// replaced in the end, and stays where writing fails or is called off.
FlapjackStatus flapjack_export(FlapjackModel *model,
                               const char *path,
                               FlapjackProgress progress,
                               void *data);

// Fills options for flapjack_generate() and flapjack_conversation_say() with what is recommended for the model; `model` may be NULL
// for general defaults. `size` is the size of the options, as the caller knows it.
void flapjack_generate_options_default(const FlapjackModel *model,
                                       FlapjackGenerateOptions *options,
                                       size_t size);

// Lets the model go on behind a text as it stands, and gives `on_text` what it writes. `options` may be NULL for what is recommended
// for the model, `on_text` and `answer` for none; `size` is that of `*answer`, as the caller knows it. Each call begins anew;
// flapjack_conversation_say() goes on.
FlapjackStatus flapjack_generate(const FlapjackModel *model,
                                 const char *prompt,
                                 const FlapjackGenerateOptions *options,
                                 FlapjackText on_text,
                                 void *data,
                                 FlapjackAnswer *answer,
                                 size_t size);

// Begins a conversation. `system` is a message that stands before all others; NULL for what the template puts there, or with the
// default model, what suits it. flapjack_conversation_free() frees it; where it cannot begin, `*conversation` is NULL.
FlapjackStatus flapjack_conversation_new(const FlapjackModel *model,
                                         const char *system,
                                         FlapjackConversation **conversation);

// Answers a message of the user, and gives `on_text` the answer. `options` may be NULL for what is recommended for the model,
// `on_text` and `answer` for none; `size` is that of `*answer`, as the caller knows it. An answer that is ended early counts
// as far as it went. Where the call fails, the conversation is as it was. Where the context is full, the oldest messages are
// left out.
FlapjackStatus flapjack_conversation_say(FlapjackConversation *conversation,
                                         const char *message,
                                         const FlapjackGenerateOptions *options,
                                         FlapjackText on_text,
                                         void *data,
                                         FlapjackAnswer *answer,
                                         size_t size);

// Sets the message that stands before all others, from the next turn on; NULL for what the template puts there.
FlapjackStatus flapjack_conversation_set_system(FlapjackConversation *conversation, const char *system);

// Forgets what was said; the system message stays.
FlapjackStatus flapjack_conversation_reset(FlapjackConversation *conversation);

// Frees a conversation. NULL is let be.
void flapjack_conversation_free(FlapjackConversation *conversation);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FLAPJACK_H */
