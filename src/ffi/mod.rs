//! The interface for C, and for whatever speaks its calling convention. Rust programs use [`engine`](crate::engine).
//!
//! `include/flapjack.h` is made from these files by cbindgen, with their comments; `docs/library.md` shows how to use it. The
//! test `c_interface` holds it to them, and writes it anew if `FLAPJACK_WRITE_HEADER` is set.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `status` | what comes of a call, the last error, and the border that no panic crosses |
//! | `values` | texts and structs that C gives, and structs that it is given |
//! | `shared` | what handles share: a model in use by one call at a time |
//! | `model` | opening, looking, pruning, writing to a file |
//! | `generate` | text behind a prompt |
//! | `conversation` | turns by the model's chat template |
//!
//! What C promises, and every `SAFETY` here leans on:
//!
//! - a handle is NULL, or came from a function of this library and was not freed;
//! - a text is NULL, or ends with a zero byte; a list of texts is NULL, or ends with NULL;
//! - a pointer to a struct is NULL, or the struct has as many bytes as its size says;
//! - a callback is NULL, or can be called with the data that it came with, and returns (it does not unwind or jump).
//!
//! Everything else is checked: what is NULL and must not be, text that is not UTF-8, numbers that no enum has, a model that another
//! call is using. Handles own their model together, so that they can be freed in any order, also by a callback.

#![expect(
    clippy::missing_safety_doc,
    reason = "these comments are the header's; what callers promise is written once, above"
)]

mod conversation;
mod generate;
mod model;
mod shared;
mod status;
mod values;

pub use conversation::{
    FlapjackConversation, flapjack_conversation_free, flapjack_conversation_new,
    flapjack_conversation_reset, flapjack_conversation_say, flapjack_conversation_set_system,
};
pub use generate::{
    FlapjackAnswer, FlapjackFinish, FlapjackGenerateOptions, FlapjackText, flapjack_generate,
    flapjack_generate_options_default,
};
pub use model::{
    FlapjackInfo, FlapjackModel, FlapjackOpenOptions, FlapjackProgress, FlapjackPruneOptions,
    FlapjackPruneReport, FlapjackTarget, flapjack_cancel, flapjack_export, flapjack_free,
    flapjack_info, flapjack_open, flapjack_open_options_default, flapjack_prune,
    flapjack_prune_options_default, flapjack_reopen, flapjack_report_json,
};
pub use status::{FlapjackStatus, flapjack_last_error, flapjack_version};
pub use values::flapjack_string_free;
