//! Many answers side by side: each is what it is alone, whenever the others come and go.

use std::collections::BTreeMap;

use crate::common::synthetic::runtime;
use flapjack::generate::{
    Finish, GenerateError, Generated, Generation, Loaded, Request, RequestId, SamplerConfig,
    Scheduler, Sequence,
};
use flapjack::gguf::GgufFile;
use flapjack::kernels::{KV_BLOCK, Runtime};
use flapjack::model::{CacheType, KvPool, Model, ModelError};
use flapjack::prune::calibrate;
use flapjack::tokenize::Tokenizer;

struct Subject {
    model: Model,
    tokenizer: Tokenizer,
    runtime: Runtime,
}

fn load() -> Subject {
    let file = GgufFile::open(crate::common::default_model()).unwrap();
    let tokenizer = Tokenizer::from_gguf(&file).unwrap();
    let runtime = runtime(2);
    let mut model = Model::load(file).unwrap();
    model.pack(&runtime);
    Subject {
        model,
        tokenizer,
        runtime,
    }
}

impl Subject {
    fn pool(&self) -> KvPool {
        KvPool::new(&self.model, CacheType::F16).unwrap()
    }

    fn scheduler(&self, pool: &KvPool) -> Scheduler {
        Scheduler::new(pool.clone())
    }

    fn loaded(&self) -> Loaded<'_> {
        Loaded {
            model: &self.model,
            runtime: &self.runtime,
            tokenizer: &self.tokenizer,
        }
    }

    fn alone(&self, request: &Request, context: usize) -> (String, Generated) {
        let mut sequence = Sequence::new(self.pool().cache(context));
        let (model, runtime, tokenizer) = (&self.model, &self.runtime, &self.tokenizer);
        let mut generation =
            Generation::new(model, runtime, tokenizer, &mut sequence, request).unwrap();
        let text = (&mut generation).map(Result::unwrap).collect();
        (text, generation.generated().unwrap().clone())
    }

    /// Some tokens of the built-in text, from a place of its own.
    fn prompt(&self, from: usize, tokens: usize) -> Vec<u32> {
        let all = self.tokenizer.encode(calibrate::TEXT).unwrap();
        all[from..from + tokens].to_vec()
    }
}

fn request(prompt: Vec<u32>, max_tokens: usize, sampler: SamplerConfig) -> Request {
    Request {
        prompt,
        max_tokens,
        sampler,
        ignore_end: true,
        ..Request::default()
    }
}

/// What has come so far of each request.
#[derive(Default)]
struct Told(BTreeMap<RequestId, (String, Option<Result<Generated, GenerateError>>)>);

impl Told {
    fn step(&mut self, scheduler: &mut Scheduler, with: Loaded) {
        for update in scheduler.step(with).unwrap() {
            let told = self.0.entry(update.id).or_default();
            assert!(told.1.is_none(), "nothing comes after the end");
            told.0 += &update.text;
            told.1 = update.ended;
        }
    }

    fn ended(&self, id: RequestId) -> (&str, &Generated) {
        let (text, ended) = &self.0[&id];
        (text, ended.as_ref().unwrap().as_ref().unwrap())
    }
}

#[test]
fn eight_answers_that_come_and_go_are_token_for_token_what_they_are_alone() {
    let loaded = load();
    let sampled = |seed| SamplerConfig {
        seed,
        temperature: 0.9,
        ..SamplerConfig::default()
    };
    let requests: Vec<Request> = [3, 700, 64, 129, 17, 300, 5, 511]
        .into_iter()
        .enumerate()
        .map(|(i, tokens)| {
            let sampler = match i % 2 {
                0 => SamplerConfig::greedy(),
                _ => sampled(i as u64),
            };
            request(loaded.prompt(400 * i, tokens), 6 + 5 * i % 17, sampler)
        })
        .collect();
    let pool = loaded.pool();
    let mut scheduler = loaded.scheduler(&pool);
    let mut told = Told::default();
    let mut ids = Vec::new();
    for request in &requests {
        ids.push(
            scheduler
                .add(loaded.loaded(), request.clone(), 800)
                .unwrap(),
        );
        told.step(&mut scheduler, loaded.loaded());
        told.step(&mut scheduler, loaded.loaded());
    }
    while !scheduler.is_empty() {
        told.step(&mut scheduler, loaded.loaded());
    }
    assert_eq!(pool.used_blocks(), 0, "all blocks are free again");
    for (id, request) in ids.iter().zip(&requests) {
        let (text, generated) = told.ended(*id);
        let (text_alone, alone) = loaded.alone(request, 800);
        assert_eq!(generated.tokens, alone.tokens);
        assert_eq!(text, text_alone);
        assert_eq!(generated.finish, Finish::Length);
        assert_eq!(generated.timings.steps, alone.timings.steps);
    }
}

#[test]
fn what_prompts_have_in_common_is_computed_once() {
    let loaded = load();
    let common = loaded.prompt(0, 200);
    let requests: Vec<Request> = (0..3)
        .map(|i| {
            let prompt = [&common[..], &loaded.prompt(300 * (i + 1), 20 + i)].concat();
            request(prompt, 4, SamplerConfig::greedy())
        })
        .collect();
    let pool = loaded.pool();
    let mut scheduler = loaded.scheduler(&pool);
    let mut told = Told::default();
    // All at the same time: the others wait for the first.
    let ids: Vec<RequestId> = requests
        .iter()
        .map(|request| {
            scheduler
                .add(loaded.loaded(), request.clone(), 300)
                .unwrap()
        })
        .collect();
    let mut most = 0;
    while !scheduler.is_empty() {
        told.step(&mut scheduler, loaded.loaded());
        most = most.max(pool.used_blocks());
    }
    let shared = common.len() / KV_BLOCK;
    assert!(most <= shared + 3, "{most} blocks, {shared} of them shared");
    for (i, (id, request)) in ids.iter().zip(&requests).enumerate() {
        let (text, generated) = told.ended(*id);
        assert_eq!(text, loaded.alone(request, 300).0);
        let computed = match i {
            0 => request.prompt.len(),
            _ => request.prompt.len() - shared * KV_BLOCK,
        };
        assert_eq!(generated.timings.prompt_tokens, computed);
    }
}

#[test]
fn a_cancelled_answer_frees_its_blocks_and_a_full_pool_makes_others_wait() {
    let loaded = load();
    let pool = KvPool::with_limit(&loaded.model, CacheType::F16, 3).unwrap();
    let mut scheduler = loaded.scheduler(&pool);
    let mut told = Told::default();
    let ask =
        |i: usize, tokens| request(loaded.prompt(500 * i, tokens), 3, SamplerConfig::greedy());
    // What no pool of this size could hold.
    assert!(matches!(
        scheduler.add(loaded.loaded(), ask(0, 200), 300),
        Err(GenerateError::PromptTooLong { room: 192, .. })
    ));
    assert!(matches!(
        scheduler.add(loaded.loaded(), ask(0, 0), 300),
        Err(GenerateError::EmptyPrompt)
    ));
    let unknown = request(vec![1, u32::MAX], 3, SamplerConfig::greedy());
    assert!(matches!(
        scheduler.add(loaded.loaded(), unknown, 300),
        Err(GenerateError::Model(ModelError::Token { place: 1, .. }))
    ));

    let [a, b, c] = [ask(0, 100), ask(1, 100), ask(2, 60)];
    let [a_id, b_id, c_id] =
        [&a, &b, &c].map(|r| scheduler.add(loaded.loaded(), r.clone(), 300).unwrap());
    told.step(&mut scheduler, loaded.loaded());
    assert_eq!(pool.used_blocks(), 2);
    assert!(!told.0.contains_key(&b_id), "there is no room for it yet");
    assert!(scheduler.cancel(a_id));
    assert!(!scheduler.cancel(a_id));
    assert_eq!(pool.used_blocks(), 0);
    while !scheduler.is_empty() {
        told.step(&mut scheduler, loaded.loaded());
    }
    for (id, request) in [(b_id, &b), (c_id, &c)] {
        assert_eq!(told.ended(id).0, loaded.alone(request, 300).0);
    }
    assert!(told.0[&a_id].1.is_none());
}

#[test]
fn a_sequence_goes_on_where_it_ended() {
    let loaded = load();
    let (model, runtime, tokenizer) = (&loaded.model, &loaded.runtime, &loaded.tokenizer);
    let first = request(loaded.prompt(0, 30), 5, SamplerConfig::greedy());
    let mut sequence = Sequence::new(loaded.pool().cache(200));
    let run = |sequence: &mut Sequence, request: &Request| {
        let mut generation = Generation::new(model, runtime, tokenizer, sequence, request).unwrap();
        (&mut generation).for_each(|piece| drop(piece.unwrap()));
        generation.generated().unwrap().tokens.clone()
    };
    let answer = run(&mut sequence, &first);
    // Nothing was asked for behind the last token, so that the model has not seen it.
    assert_eq!(
        sequence.tokens(),
        [&first.prompt[..], &answer[..4]].concat()
    );
    let mut copy = sequence.clone();

    let more = request(loaded.prompt(100, 10), 5, SamplerConfig::greedy());
    let second = run(&mut sequence, &more);
    let seen = [&first.prompt[..], &answer, &more.prompt, &second[..4]].concat();
    assert_eq!(sequence.tokens(), seen);
    // A copy goes on by itself, and so does what was cut back.
    assert_eq!(run(&mut copy, &more), second);
    copy.truncate(30);
    assert_eq!(copy.tokens(), first.prompt);
    let nothing = request(Vec::new(), 5, SamplerConfig::greedy());
    assert!(matches!(
        Generation::new(model, runtime, tokenizer, &mut copy, &nothing),
        Err(GenerateError::EmptyPrompt)
    ));
    // What the model has not seen is enough to go on from.
    let went_on = run(&mut sequence, &nothing);
    assert_eq!(went_on.len(), 5);
}

#[test]
fn a_prompt_beside_an_answer_goes_in_over_several_steps_and_can_be_dropped_or_paused_in_the_middle()
{
    let loaded = load();
    let sampler = SamplerConfig::greedy();
    let running = request(loaded.prompt(0, 20), 60, sampler.clone());
    let long = request(loaded.prompt(30, 600), 4, sampler);
    let pool = loaded.pool();
    let mut scheduler = loaded.scheduler(&pool);
    let mut told = Told::default();
    let add = |scheduler: &mut Scheduler, request: &Request| {
        scheduler
            .add(loaded.loaded(), request.clone(), 700)
            .unwrap()
    };
    let answer = add(&mut scheduler, &running);
    for _ in 0..3 {
        told.step(&mut scheduler, loaded.loaded());
    }
    let before = scheduler.used_blocks();

    // Dropped in the middle, its blocks are free, and the answer goes on.
    let dropped = add(&mut scheduler, &long);
    for _ in 0..2 {
        told.step(&mut scheduler, loaded.loaded());
    }
    assert!(!told.0.contains_key(&dropped), "the prompt is not read yet");
    assert!(scheduler.used_blocks() > before);
    assert!(scheduler.cancel(dropped));
    assert_eq!(scheduler.used_blocks(), before);

    // Another one is begun; a pause forgets how far it was.
    let prompt = add(&mut scheduler, &long);
    for _ in 0..2 {
        told.step(&mut scheduler, loaded.loaded());
    }
    scheduler.pause(loaded.pool());
    let mut steps = 0;
    while !told.0.contains_key(&prompt) {
        told.step(&mut scheduler, loaded.loaded());
        steps += 1;
    }
    while !scheduler.is_empty() {
        told.step(&mut scheduler, loaded.loaded());
    }
    assert!(steps > 0);
    let (text, generated) = told.ended(prompt);
    let (alone, expected) = loaded.alone(&long, 700);
    assert_eq!((text, &generated.tokens), (&*alone, &expected.tokens));
    assert_eq!(told.ended(answer).1.tokens.len(), 60);
}

#[test]
fn answers_go_on_at_every_step_while_a_long_prompt_is_read() {
    let loaded = load();
    let sampler = SamplerConfig::greedy();
    let running = request(loaded.prompt(0, 20), 400, sampler.clone());
    let long = request(loaded.prompt(30, 600), 4, sampler);
    let pool = loaded.pool();
    let mut scheduler = loaded.scheduler(&pool);
    let mut told = Told::default();
    let answer = scheduler
        .add(loaded.loaded(), running.clone(), 700)
        .unwrap();
    for _ in 0..3 {
        told.step(&mut scheduler, loaded.loaded());
    }
    let prompt = scheduler.add(loaded.loaded(), long.clone(), 700).unwrap();
    let mut steps = 0;
    while !told.0.contains_key(&prompt) {
        let updates = scheduler.step(loaded.loaded()).unwrap();
        let tokens = updates
            .iter()
            .filter(|update| update.id == answer && update.token.is_some());
        assert_eq!(tokens.count(), 1, "a token of the answer in step {steps}");
        for update in updates {
            let told = told.0.entry(update.id).or_default();
            told.0 += &update.text;
            told.1 = update.ended;
        }
        steps += 1;
    }
    assert!(steps > 3, "{steps} steps for a prompt of 600 tokens");
    while !scheduler.is_empty() {
        told.step(&mut scheduler, loaded.loaded());
    }
    for (id, request) in [(answer, running), (prompt, long)] {
        let (alone, expected) = loaded.alone(&request, 700);
        let (text, generated) = told.ended(id);
        assert_eq!((text, &generated.tokens), (&*alone, &expected.tokens));
    }
}
