//! Conversations: turns that are kept, answers that are stopped or made anew, and what happens when the context is full.

use std::ops::ControlFlow;

use crate::common::engine::{Workshop, flap};
use flapjack::chat::{ChatOptions, ChatTemplate, Message, Piece};
use flapjack::engine::{
    Conversation, Engine, EngineError, GenerateOptions, PruneOptions, Reply, SequenceOptions,
    Snapshot, ignore,
};
use flapjack::generate::{Finish, GenerateError, SamplerConfig};
use flapjack::prune::Target;

fn engine() -> (Workshop, Engine) {
    let workshop = Workshop::new();
    let mut engine = workshop.open();
    engine.set_chat_template(ChatTemplate::builtin("chatml").unwrap());
    (workshop, engine)
}

fn conversation(context: Option<usize>) -> Conversation {
    let options = SequenceOptions {
        context,
        ..SequenceOptions::default()
    };
    Conversation::new(options, ChatOptions::default())
}

fn greedy(max_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        max_tokens,
        sampler: SamplerConfig::greedy(),
        ignore_end: true,
        ..GenerateOptions::default()
    }
}

fn go_on(_: &[Piece]) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn ask(conversation: &mut Conversation, engine: &Engine, message: &str) -> Reply {
    conversation
        .ask(engine, message, &greedy(8), &mut go_on)
        .expect("there is an answer")
}

/// Tokens of a conversation as the template writes it.
fn length(engine: &Engine, messages: &[Message]) -> usize {
    engine
        .chat_prompt(messages, &ChatOptions::default())
        .unwrap()
        .len()
}

#[test]
fn the_first_answer_is_what_the_model_says_behind_the_rendered_message() {
    let (_workshop, engine) = engine();
    let mut conversation = conversation(None);
    let reply = ask(&mut conversation, &engine, "Hello");
    let prompt = engine
        .chat_prompt(&[Message::user("Hello")], &ChatOptions::default())
        .unwrap();
    let mut sequence = engine.sequence();
    let alone: String = engine
        .generate_behind(&mut sequence, prompt, &greedy(8))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(reply.text.trim_end(), alone.trim());
    assert_eq!((reply.tokens, reply.finish), (8, Some(Finish::Length)));
    let roles = conversation.messages().iter().map(|m| m.role.as_str());
    assert_eq!(roles.collect::<Vec<_>>(), ["user", "assistant"]);
}

#[test]
fn of_a_later_turn_only_what_is_new_is_read() {
    let (_workshop, engine) = engine();
    let mut conversation = conversation(None);
    conversation.set_system(Some(
        "Some words that stand before everything else.".to_owned(),
    ));
    let first = ask(&mut conversation, &engine, "One question");
    let second = ask(&mut conversation, &engine, "Another");
    assert!(first.timings.prompt_tokens > second.timings.prompt_tokens);
    let (filled, all) = conversation.fill(&engine);
    assert!(filled > first.timings.prompt_tokens + second.timings.prompt_tokens);
    assert_eq!(all, engine.model().config.context_length);
    // What the model has read is of no use to another model, but what was said is.
    conversation.forget_cache();
    assert_eq!(conversation.fill(&engine).0, 0);
    let third = ask(&mut conversation, &engine, "A third");
    assert!(third.timings.prompt_tokens > filled);
}

#[test]
fn an_answer_that_is_stopped_stays_as_far_as_it_went() {
    let (_workshop, engine) = engine();
    let mut conversation = conversation(None);
    let mut steps = 0;
    let stop = &mut |_: &[Piece]| {
        steps += 1;
        match steps < 4 {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        }
    };
    let reply = conversation
        .ask(&engine, "Hello", &greedy(100), stop)
        .unwrap();
    assert_eq!(reply.finish, Some(Finish::Stopped));
    assert!(reply.tokens < 10);
    assert_eq!(conversation.messages()[1].text(), reply.text);
    ask(&mut conversation, &engine, "Go on");
    assert_eq!(conversation.messages().len(), 4);
}

#[test]
fn an_answer_is_made_anew_in_the_place_of_the_old_one() {
    let (_workshop, engine) = engine();
    let mut conversation = conversation(None);
    let again = |conversation: &mut Conversation| {
        conversation
            .ask_again(&engine, &greedy(8), &mut go_on)
            .unwrap()
    };
    assert!(again(&mut conversation).is_none(), "nothing was asked");
    let first = ask(&mut conversation, &engine, "Hello");
    let second = again(&mut conversation).unwrap();
    assert_eq!(second.text, first.text, "nothing is left to chance");
    assert_eq!(conversation.messages().len(), 2);
    conversation.reset();
    assert!(conversation.messages().is_empty() && again(&mut conversation).is_none());
}

#[test]
fn what_no_longer_fits_is_left_out_from_the_oldest_on_and_the_system_message_stays() {
    let (_workshop, engine) = engine();
    let system = "A message that stays.";
    let mut conversation = conversation(Some(300));
    conversation.set_system(Some(system.to_owned()));
    let mut left_out = 0;
    for turn in 0..6 {
        let reply = ask(
            &mut conversation,
            &engine,
            &format!("Turn {turn}: {}", "word ".repeat(8)),
        );
        left_out += reply.newly_left_out;
        assert_eq!(
            conversation.messages().len(),
            2 * (turn + 1),
            "it stays said"
        );
        let rest = conversation.messages()[left_out..2 * turn + 1]
            .iter()
            .cloned();
        let read: Vec<Message> = [Message::system(system)].into_iter().chain(rest).collect();
        assert!(length(&engine, &read) + 8 <= 300, "turn {turn}");
        assert!(left_out.is_multiple_of(2), "whole turns");
    }
    assert!(left_out > 0);
}

#[test]
fn a_message_that_is_longer_than_the_context_is_refused_and_nothing_has_changed() {
    let (_workshop, engine) = engine();
    let mut conversation = conversation(Some(100));
    ask(&mut conversation, &engine, "Hello");
    let long = "word ".repeat(100);
    let error = conversation
        .ask(&engine, long, &greedy(8), &mut go_on)
        .unwrap_err();
    assert!(
        matches!(
            error,
            EngineError::Generate(GenerateError::PromptTooLong { .. })
        ),
        "{error}"
    );
    assert_eq!(conversation.messages().len(), 2);
    ask(&mut conversation, &engine, "Hello again");
}

#[test]
fn a_conversation_goes_on_from_messages_and_on_a_pruned_model() {
    let (_workshop, mut engine) = engine();
    let mut conversation = conversation(None);
    conversation.set_messages(vec![
        Message::system("Be brief."),
        Message::user("a"),
        Message::assistant("b"),
    ]);
    assert_eq!(conversation.system(), Some("Be brief."));
    assert_eq!(conversation.messages().len(), 2);
    let before = ask(&mut conversation, &engine, "c");
    let dense = engine.model().bytes();
    engine.prune(&flap(), &mut ignore).unwrap();
    conversation.forget_cache();
    ask(&mut conversation, &engine, "d");
    assert!(engine.is_touched() && engine.model().bytes() < dense);
    // As its file has it again, the model says what it said.
    engine.reopen().unwrap();
    assert!(!engine.is_touched() && engine.pruned().is_none());
    assert_eq!(engine.model().bytes(), dense);
    conversation.set_messages(vec![
        Message::system("Be brief."),
        Message::user("a"),
        Message::assistant("b"),
    ]);
    conversation.forget_cache();
    assert_eq!(ask(&mut conversation, &engine, "c").text, before.text);
}

#[test]
fn what_other_weights_have_read_is_read_again() {
    let (workshop, mut engine) = engine();
    let mut conversation = conversation(None);
    let first = ask(&mut conversation, &engine, "One").timings.prompt_tokens;
    let second = ask(&mut conversation, &engine, "Two").timings.prompt_tokens;
    // So little goes that all KV heads stay, and keys and values would fit.
    let pruning = PruneOptions {
        target: Target::Ratio(0.1),
        ..flap()
    };
    let pruned = engine.prune(&pruning, &mut ignore).unwrap();
    let kv_heads = |snapshot: &Snapshot| snapshot.layers.iter().map(|l| l.kv_heads).sum::<usize>();
    assert_eq!(kv_heads(&pruned.before), kv_heads(&pruned.after));
    let third = ask(&mut conversation, &engine, "Three");
    assert!(third.timings.prompt_tokens > first + second);
    let mut other = workshop.open();
    other.set_chat_template(ChatTemplate::builtin("chatml").unwrap());
    let fourth = ask(&mut conversation, &other, "Four");
    assert!(fourth.timings.prompt_tokens > third.timings.prompt_tokens);
    let fifth = ask(&mut conversation, &other, "Five");
    assert!(fifth.timings.prompt_tokens < first + second);
}
