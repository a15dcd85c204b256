//! Turns with a model, by its chat template.

use std::ffi::{c_char, c_void};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use super::generate::{
    FlapjackAnswer, FlapjackGenerateOptions, FlapjackText, Sink, generate_options,
};
use super::model::{FlapjackModel, shared};
use super::shared::{Shared, lock};
use super::status::{Failure, FlapjackStatus, call};
use super::values::{fill, is_null, needed_text, place, text};
use crate::chat::{ChatOptions, Piece};
use crate::engine::Conversation;
use crate::generate::Finish;

/// A conversation with a model. What was said is kept, and what the model has read of it is not read again.
pub struct FlapjackConversation {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    conversation: Mutex<Conversation>,
}

/// What a handle has.
///
/// # Safety
/// It is NULL, or a conversation that was not freed.
unsafe fn inner(conversation: *const FlapjackConversation) -> Result<Arc<Inner>, Failure> {
    // SAFETY: as the caller promises. The handle may be freed by a callback; what is in it stays until the call ends.
    let conversation = unsafe { conversation.as_ref() };
    let conversation = conversation.ok_or_else(|| is_null("the conversation"))?;
    Ok(conversation.inner.clone())
}

/// Begins a conversation. `system` is a message that stands before all others; NULL for what the template puts there, or with the
/// default model, what suits it. flapjack_conversation_free() frees it; where it cannot begin, `*conversation` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_conversation_new(
    model: *const FlapjackModel,
    system: *const c_char,
    conversation: *mut *mut FlapjackConversation,
) -> FlapjackStatus {
    call(|| {
        // SAFETY: as the module's documentation says, here and below.
        let place = unsafe { place(conversation, "the place for the conversation") }?;
        let shared = unsafe { shared(model) }?;
        let system = unsafe { text(system, "the system message") }?;
        shared.take()?.chat_template()?;
        let mut conversation = Conversation::new(shared.sequence, ChatOptions::default());
        conversation.set_system(system.or(shared.system).map(str::to_owned));
        let inner = Arc::new(Inner {
            shared,
            conversation: Mutex::new(conversation),
        });
        *place = Box::into_raw(Box::new(FlapjackConversation { inner }));
        Ok(())
    })
}

/// Answers a message of the user, and gives `on_text` the answer. `options` may be NULL for what is recommended for the model,
/// `on_text` and `answer` for none; `size` is that of `*answer`, as the caller knows it. An answer that is ended early counts
/// as far as it went. Where the call fails, the conversation is as it was. Where the context is full, the oldest messages are
/// left out.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_conversation_say(
    conversation: *mut FlapjackConversation,
    message: *const c_char,
    options: *const FlapjackGenerateOptions,
    on_text: FlapjackText,
    data: *mut c_void,
    answer: *mut FlapjackAnswer,
    size: usize,
) -> FlapjackStatus {
    call(|| {
        // SAFETY: as the module's documentation says, here and below.
        let inner = unsafe { inner(conversation) }?;
        let message = unsafe { needed_text(message, "the message") }?;
        let mut conversation = lock(&inner.conversation, "the conversation")?;
        let shared = &inner.shared;
        let engine = shared.take()?;
        let (options, on_reasoning) = unsafe { generate_options(options, &engine, shared) }?;
        let mut answers = Sink::new(on_text, data);
        let mut thoughts = Sink::new(on_reasoning, data);
        let mut stopped = false;
        let on_step = &mut |pieces: &[Piece]| {
            for piece in pieces {
                let told = match piece {
                    // Behind a break the rest is told too, which nobody wants any more.
                    _ if stopped => ControlFlow::Break(()),
                    Piece::Text(text) => answers.take(text),
                    Piece::Reasoning(text) => thoughts.take(text),
                    // There are no tools.
                    Piece::Call(_) => ControlFlow::Continue(()),
                };
                stopped |= told.is_break();
            }
            match stopped {
                true => ControlFlow::Break(()),
                false => shared.go_on(),
            }
        };
        let reply = conversation.ask(&engine, message, &options, on_step)?;
        let numbers = FlapjackAnswer::new(
            reply.tokens,
            reply.finish.unwrap_or(Finish::Stopped),
            &reply.timings,
            reply.newly_left_out,
        );
        unsafe { fill(answer, size, &numbers) };
        Ok(())
    })
}

/// Sets the message that stands before all others, from the next turn on; NULL for what the template puts there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_conversation_set_system(
    conversation: *mut FlapjackConversation,
    system: *const c_char,
) -> FlapjackStatus {
    call(|| {
        // SAFETY: as the module's documentation says, here and below.
        let inner = unsafe { inner(conversation) }?;
        let system = unsafe { text(system, "the system message") }?;
        lock(&inner.conversation, "the conversation")?.set_system(system.map(str::to_owned));
        Ok(())
    })
}

/// Forgets what was said; the system message stays.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_conversation_reset(
    conversation: *mut FlapjackConversation,
) -> FlapjackStatus {
    call(|| {
        // SAFETY: as the module's documentation says of handles.
        let inner = unsafe { inner(conversation) }?;
        lock(&inner.conversation, "the conversation")?.reset();
        Ok(())
    })
}

/// Frees a conversation. NULL is let be.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_conversation_free(conversation: *mut FlapjackConversation) {
    if !conversation.is_null() {
        call(|| {
            // SAFETY: it came from `flapjack_conversation_new`.
            drop(unsafe { Box::from_raw(conversation) });
            Ok(())
        });
    }
}
