//! Many answers at once, that come and go at different steps.

use std::time::Instant;

use super::answer::{Answer, Then};
use super::sequence::PROMPT_BATCH;
use super::{GenerateError, Generated, Request, Timings};
use crate::kernels::{KV_BLOCK, Phase, Runtime};
use crate::model::{Batch, KvCache, KvPool, Model, ModelError, Scratch, Unobserved};
use crate::tokenize::Tokenizer;

/// Answers requests side by side. Every step is one pass through the model, in which each answer that is under way gets its
/// next token and prompts that wait go in by pieces. An answer is token for token what it would be alone.
///
/// What prompts have in common at their beginnings, in whole blocks of the KV cache, is computed and kept once for all that are
/// there at the same time.
#[derive(Debug)]
pub struct Scheduler<'m> {
    model: &'m Model,
    runtime: &'m Runtime,
    tokenizer: &'m Tokenizer,
    pool: KvPool,
    jobs: Vec<Job<'m>>,
    next_id: u64,
    batch: Batch,
    scratch: Scratch,
    logits: Vec<f32>,
}

/// Which request of a [`Scheduler`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// What a step brought for one request.
#[derive(Debug)]
pub struct Update {
    pub id: RequestId,
    /// Text that has become complete; may be empty.
    pub text: String,
    /// What came out, where the answer has ended with this step.
    pub ended: Option<Result<Generated, GenerateError>>,
}

/// A request and how far it is.
#[derive(Debug)]
struct Job<'m> {
    id: RequestId,
    prompt: Vec<u32>,
    context: usize,
    answer: Answer<'m>,
    timings: Timings,
    /// When the prompt began, and when the step before ended.
    since: Instant,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Nothing is computed yet.
    Waiting,
    /// Part of the prompt is in the cache.
    Prompt(KvCache),
    /// The answer is under way; this is its last token, which the model has not seen.
    Generating(KvCache, u32),
}

impl State {
    fn cache(&self) -> Option<&KvCache> {
        match self {
            State::Waiting => None,
            State::Prompt(cache) | State::Generating(cache, _) => Some(cache),
        }
    }

    fn cache_mut(&mut self) -> Option<&mut KvCache> {
        match self {
            State::Waiting => None,
            State::Prompt(cache) | State::Generating(cache, _) => Some(cache),
        }
    }
}

/// What the rows of a batch are to a job.
struct Share {
    job: usize,
    /// Tokens of the prompt that go in, or 1 generated token.
    tokens: usize,
    /// Whether the logits behind the last of them are wanted.
    wants_logits: bool,
}

impl<'m> Scheduler<'m> {
    /// A scheduler whose answers take their caches from this pool, which must be of this model.
    pub fn new(
        model: &'m Model,
        runtime: &'m Runtime,
        tokenizer: &'m Tokenizer,
        pool: KvPool,
    ) -> Self {
        Self {
            model,
            runtime,
            tokenizer,
            pool,
            jobs: Vec::new(),
            next_id: 0,
            batch: Batch::new(),
            scratch: Scratch::new(),
            logits: Vec::new(),
        }
    }

    /// Takes on a request, whose prompt and answer together have at most `context` tokens.
    ///
    /// # Errors
    /// If the prompt has no tokens, one that is not in the vocabulary, or more than the context or the whole pool holds.
    pub fn add(&mut self, request: Request, context: usize) -> Result<RequestId, GenerateError> {
        let prompt = request.prompt.len();
        if prompt == 0 {
            return Err(GenerateError::EmptyPrompt);
        }
        let all = self.pool.used_blocks() + self.pool.blocks_left();
        let room = context.min(all.saturating_mul(KV_BLOCK));
        if prompt > room {
            return Err(GenerateError::PromptTooLong {
                prompt,
                room,
                context,
            });
        }
        let vocabulary = self.model.config.vocabulary;
        let known = |token: &u32| (*token as usize) < vocabulary;
        if let Some(place) = request.prompt.iter().position(|token| !known(token)) {
            return Err(ModelError::Token {
                token: request.prompt[place],
                place,
                vocabulary,
            }
            .into());
        }
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.jobs.push(Job {
            id,
            answer: Answer::new(self.tokenizer, &request),
            prompt: request.prompt,
            context,
            timings: Timings::default(),
            since: Instant::now(),
            state: State::Waiting,
        });
        Ok(id)
    }

    /// Drops a request, whatever came of it; its blocks are free at once. Says whether it was there.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let before = self.jobs.len();
        self.jobs.retain(|job| job.id != id);
        self.jobs.len() < before
    }

    /// Requests that are not answered yet.
    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Takes one pass through the model, and tells what it brought. Does nothing where there are no requests.
    ///
    /// # Errors
    /// Those of a forward pass that concern no single request; these are told in [`Update`].
    pub fn step(&mut self) -> Result<Vec<Update>, GenerateError> {
        let mut told = Vec::new();
        let shares = self.plan(&mut told);
        if !shares.is_empty() {
            self.run(&shares)?;
            self.choose(&shares, &mut told);
        }
        let ended: Vec<RequestId> = told
            .iter()
            .filter(|update| update.ended.is_some())
            .map(|update| update.id)
            .collect();
        self.jobs.retain(|job| !ended.contains(&job.id));
        Ok(told)
    }

    /// Shares the next pass out: a token for every answer under way, and prompts in the order in which they came, as far as
    /// [`PROMPT_BATCH`] tokens and the pool allow. An answer for whose next token there is no block is ended.
    fn plan(&mut self, told: &mut Vec<Update>) -> Vec<Share> {
        let mut shares = Vec::new();
        // A block for every answer, and for prompts as many as the tokens that go in and the beginnings of as many blocks.
        let most = 2 * self.jobs.len() + PROMPT_BATCH / KV_BLOCK;
        let mut blocks = self.pool.blocks_of(most);
        for (j, job) in self.jobs.iter().enumerate() {
            let State::Generating(cache, _) = &job.state else {
                continue;
            };
            let needed = usize::from(cache.len().is_multiple_of(KV_BLOCK));
            if needed > blocks {
                told.push(self.refused(job, needed));
                continue;
            }
            blocks -= needed;
            shares.push(Share {
                job: j,
                tokens: 1,
                wants_logits: true,
            });
        }
        let mut left = PROMPT_BATCH;
        for j in 0..self.jobs.len() {
            if left == 0 {
                break;
            }
            if !self.start(j) {
                continue;
            }
            let job = &self.jobs[j];
            let State::Prompt(cache) = &job.state else {
                continue;
            };
            let tokens = left.min(job.prompt.len() - cache.len());
            let end = cache.len() + tokens;
            let needed = end.div_ceil(KV_BLOCK) - cache.len().div_ceil(KV_BLOCK);
            if needed > blocks {
                // Blocks come back when an answer ends; where none is under way, nothing would ever change.
                if shares.is_empty() && told.is_empty() {
                    told.push(self.refused(job, needed));
                }
                break;
            }
            blocks -= needed;
            left -= tokens;
            shares.push(Share {
                job: j,
                tokens,
                wants_logits: end == job.prompt.len(),
            });
        }
        shares
    }

    /// The end of a job for which there are no blocks.
    fn refused(&self, job: &Job, needed: usize) -> Update {
        Update {
            id: job.id,
            text: String::new(),
            ended: Some(Err(self.pool.why_not(needed).into())),
        }
    }

    /// Gives a waiting job its cache, with what others have computed of its prompt; not while another one is computing a block
    /// that it could have. Says whether the job has a cache.
    fn start(&mut self, j: usize) -> bool {
        let job = &self.jobs[j];
        if !matches!(job.state, State::Waiting) {
            return true;
        }
        let cache = self.pool.cache_for(&job.prompt, job.context);
        let shares_more = |other: &Job| match &other.state {
            State::Prompt(_) => {
                let common = job.prompt.iter().zip(&other.prompt);
                let common = common.take_while(|(a, b)| a == b).count();
                let last = job.prompt.len() - 1;
                common.min(last) / KV_BLOCK * KV_BLOCK > cache.len()
            }
            _ => false,
        };
        if self.jobs.iter().any(shares_more) {
            return false;
        }
        let job = &mut self.jobs[j];
        job.timings.prompt_tokens = job.prompt.len() - cache.len();
        job.since = Instant::now();
        job.state = State::Prompt(cache);
        true
    }

    /// Runs what was shared out. The logits of the rows that want them are then there, in the order of the shares.
    fn run(&mut self, shares: &[Share]) -> Result<(), GenerateError> {
        let Self {
            model,
            runtime,
            jobs,
            batch,
            scratch,
            logits,
            ..
        } = self;
        batch.clear();
        for (s, share) in shares.iter().enumerate() {
            let job = &jobs[share.job];
            match &job.state {
                State::Generating(cache, token) => batch.add_generated(s, cache.len(), *token),
                State::Prompt(cache) => {
                    let (first, n) = (cache.len(), share.tokens);
                    let wanted = if share.wants_logits { n - 1..n } else { 0..0 };
                    batch.add_prompt(s, first, &job.prompt[first..first + n], wanted);
                }
                State::Waiting => unreachable!("a share is of a job with a cache"),
            }
        }
        let mut caches: Vec<Option<&mut KvCache>> =
            jobs.iter_mut().map(|job| job.state.cache_mut()).collect();
        let mut sequences: Vec<&mut KvCache> = shares
            .iter()
            .map(|share| caches[share.job].take().expect("one share for each job"))
            .collect();
        let wanted = shares.iter().filter(|share| share.wants_logits).count();
        runtime.region(|team| {
            model.forward(team, batch.rows(), &mut sequences, scratch, &mut Unobserved)?;
            model.logits(team, Phase::Decode, 0..wanted, scratch, logits);
            Ok(())
        })
    }

    /// Chooses the next token of every answer whose logits are there.
    fn choose(&mut self, shares: &[Share], told: &mut Vec<Update>) {
        let mut rows = self.logits.chunks_exact_mut(self.model.config.vocabulary);
        for share in shares {
            let job = &mut self.jobs[share.job];
            let Some(cache) = job.state.cache() else {
                continue;
            };
            if let State::Prompt(cache) = &job.state {
                cache.share(&job.prompt[..cache.len()]);
            }
            if !share.wants_logits {
                continue;
            }
            let Some(logits) = rows.next() else { break };
            let (position, room) = (cache.len(), cache.capacity() - cache.len());
            let is_prompt = matches!(job.state, State::Prompt(_));
            let elapsed = job.since.elapsed();
            job.since = Instant::now();
            if is_prompt {
                job.timings.prompt = elapsed;
            } else {
                job.timings.steps += 1;
                job.timings.generation += elapsed;
            }
            let mut update = Update {
                id: job.id,
                text: String::new(),
                ended: None,
            };
            match job.answer.next(logits, position, room) {
                Ok(next) => {
                    update.text = next.text;
                    match next.then {
                        Then::Token(token) => {
                            job.state = match std::mem::replace(&mut job.state, State::Waiting) {
                                State::Prompt(cache) | State::Generating(cache, _) => {
                                    State::Generating(cache, token)
                                }
                                State::Waiting => State::Waiting,
                            };
                        }
                        Then::End(finish) => {
                            update.ended = Some(Ok(Generated {
                                tokens: job.answer.tokens().to_vec(),
                                finish,
                                timings: job.timings,
                            }));
                        }
                    }
                }
                Err(error) => update.ended = Some(Err(error)),
            }
            told.push(update);
        }
    }
}
