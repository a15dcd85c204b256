//! Many answers at once, that come and go at different steps.

use std::time::Instant;

use super::answer::{Answer, Then};
use super::logprobs::PromptScores;
use super::piece::{Pace, Piece};
use super::sequence::PROMPT_BATCH;
use super::{GenerateError, Generated, Request, Timings, TokenLogprob};
use crate::kernels::{KV_BLOCK, Phase, Runtime};
use crate::model::{Batch, KvCache, KvPool, Model, ModelError, Scratch, Unobserved};
use crate::tokenize::Tokenizer;

/// Answers requests side by side. Every step is one pass through the model, in which each answer that is under way gets its
/// next token, and prompts that wait go on as far as the answers can bear. An answer is token for token what it would be alone.
///
/// What prompts have in common at their beginnings, in whole blocks of the KV cache, is computed and kept once for all that are
/// there at the same time.
#[derive(Debug)]
pub struct Scheduler {
    pool: KvPool,
    jobs: Vec<Job>,
    next_id: u64,
    /// Blocks that stay behind answers.
    kept: usize,
    pace: Pace,
    /// A piece of a prompt that is on its way through the layers beside answers.
    piece: Option<Piece>,
    /// Buffers for the next one.
    piece_scratch: Scratch,
    /// The logits behind one, `[vocabulary]`.
    piece_row: Vec<f32>,
    batch: Batch,
    scratch: Scratch,
    /// The logits behind the last tokens of the answers that get a next one, in the order of their shares.
    logits: Vec<f32>,
    /// One of them in the making.
    row: Vec<f32>,
}

/// A model that is ready to run, with its threads and its tokenizer. Answers of a [`Scheduler`] are made with the same one from step
/// to step, unless they are [paused](Scheduler::pause) in between.
#[derive(Debug, Clone, Copy)]
pub struct Loaded<'a> {
    pub model: &'a Model,
    pub runtime: &'a Runtime,
    pub tokenizer: &'a Tokenizer,
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
    /// The token that was generated; `None` if the answer ended without one more.
    pub token: Option<u32>,
    /// How likely the model held it, where this was asked for.
    pub logprob: Option<TokenLogprob>,
    /// How likely the model held the prompt's second token and those behind it, where this was asked for: all of them, with the
    /// first update.
    pub prompt_logprobs: Vec<TokenLogprob>,
    /// What came out, where the answer has ended with this step.
    pub ended: Option<Result<Generated, GenerateError>>,
}

impl Update {
    fn new(id: RequestId) -> Self {
        Self {
            id,
            text: String::new(),
            token: None,
            logprob: None,
            prompt_logprobs: Vec::new(),
            ended: None,
        }
    }
}

/// A request and how far it is.
#[derive(Debug)]
struct Job {
    id: RequestId,
    prompt: Vec<u32>,
    context: usize,
    answer: Answer,
    /// How likely the prompt's tokens are; `None` if nobody wants to know.
    scores: Option<PromptScores>,
    timings: Timings,
    /// When the prompt began, and when the step before ended.
    since: Instant,
    state: State,
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.pool.keep(0);
    }
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
    /// Whether the logits behind the last of them are wanted, for the next token.
    wants_next: bool,
    /// Of how many of them logits are wanted, from the last one backwards.
    wanted: usize,
}

impl Scheduler {
    /// A scheduler whose answers take their caches from this pool, which must be of the model that they are made with.
    pub fn new(pool: KvPool) -> Self {
        Self {
            pool,
            jobs: Vec::new(),
            next_id: 0,
            kept: 0,
            pace: Pace::default(),
            piece: None,
            piece_scratch: Scratch::new(),
            piece_row: Vec::new(),
            batch: Batch::new(),
            scratch: Scratch::new(),
            logits: Vec::new(),
            row: Vec::new(),
        }
    }

    /// Takes on a request, whose prompt and answer together have at most `context` tokens.
    ///
    /// # Errors
    /// If the prompt has no tokens, one that is not in the vocabulary, or more than the context or the whole pool holds.
    pub fn add(
        &mut self,
        with: Loaded,
        request: Request,
        context: usize,
    ) -> Result<RequestId, GenerateError> {
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
        let vocabulary = with.model.config.vocabulary;
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
            answer: Answer::new(with.tokenizer, &request, request.prompt.clone()),
            scores: request
                .prompt_logprobs
                .map(|top| PromptScores::new(request.prompt.clone(), 0, top)),
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

    /// Lets go of all that was computed, so that answers under way can go on with another model of the same vocabulary, whose pool
    /// this is: it first reads what they have so far.
    pub fn pause(&mut self, pool: KvPool) {
        self.piece = None;
        self.pool.keep(0);
        pool.keep(self.kept);
        for job in &mut self.jobs {
            job.prompt = job.answer.history().to_vec();
            job.state = State::Waiting;
            if let Some(scores) = &mut job.scores {
                scores.restart();
            }
        }
        self.pool = pool;
    }

    /// Has so many blocks of the KV cache stay behind answers that have ended, for prompts to come that begin with the same tokens.
    pub fn keep_prompts(&mut self, blocks: usize) {
        self.kept = blocks;
        self.pool.keep(blocks);
    }

    /// Blocks of the KV cache that answers hold.
    pub fn used_blocks(&self) -> usize {
        self.pool.used_blocks()
    }

    /// Requests that are not answered yet.
    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Gives every answer its next token and takes prompts further, and tells what that brought. Does nothing where there are no
    /// requests.
    ///
    /// # Errors
    /// Those of a forward pass that concern no single request; these are told in [`Update`].
    pub fn step(&mut self, with: Loaded) -> Result<Vec<Update>, GenerateError> {
        let mut told = Vec::new();
        // A block for every answer, and for prompts as many as the tokens that go in and the beginnings of as many blocks.
        let most = 2 * self.jobs.len() + PROMPT_BATCH / KV_BLOCK;
        let mut blocks = self.pool.blocks_of(most);
        let mut shares = self.plan_answers(&mut blocks, &mut told);
        let read = self.read_piece(with, !shares.is_empty(), blocks)?;
        if !shares.is_empty() {
            let start = Instant::now();
            self.run(with, &shares)?;
            self.pace.answers_took(start.elapsed());
        } else if read.is_none() {
            shares = self.plan_prompts(blocks, &mut told);
            if !shares.is_empty() {
                self.run(with, &shares)?;
            }
        } else {
            self.logits.clear();
        }
        if let Some(read) = read {
            if read.wants_next {
                self.logits.extend_from_slice(&self.piece_row);
            }
            shares.push(read);
        }
        self.choose(with, &shares, &mut told);
        let ended: Vec<RequestId> = told
            .iter()
            .filter(|update| update.ended.is_some())
            .map(|update| update.id)
            .collect();
        self.jobs.retain(|job| !ended.contains(&job.id));
        Ok(told)
    }

    /// A token for every answer under way. One for whose next token there is no block is ended.
    fn plan_answers(&self, blocks: &mut usize, told: &mut Vec<Update>) -> Vec<Share> {
        let mut shares = Vec::new();
        for (j, job) in self.jobs.iter().enumerate() {
            let State::Generating(cache, _) = &job.state else {
                continue;
            };
            let needed = usize::from(cache.len().is_multiple_of(KV_BLOCK));
            if needed > *blocks {
                told.push(self.refused(job, needed));
                continue;
            }
            *blocks -= needed;
            shares.push(Share {
                job: j,
                tokens: 1,
                wants_next: true,
                wanted: 1,
            });
        }
        shares
    }

    /// Prompts in the order in which they came, as far as [`PROMPT_BATCH`] tokens and these blocks allow, where no answer is under
    /// way. Where nothing can go in, the first of them is ended.
    fn plan_prompts(&mut self, mut blocks: usize, told: &mut Vec<Update>) -> Vec<Share> {
        let mut shares = Vec::new();
        let mut left = PROMPT_BATCH;
        for j in 0..self.jobs.len() {
            if left == 0 {
                break;
            }
            let Some((share, needed)) = self.next_share(j, left) else {
                continue;
            };
            if needed > blocks {
                // Blocks come back when an answer ends; where none is under way, nothing would ever change.
                if shares.is_empty() && told.is_empty() {
                    told.push(self.refused(&self.jobs[j], needed));
                }
                break;
            }
            blocks -= needed;
            left -= share.tokens;
            shares.push(share);
        }
        shares
    }

    /// What goes in next of a job's prompt, of at most so many tokens, and the blocks that it takes; `None` if all of it is there or
    /// it waits for another.
    fn next_share(&mut self, j: usize, most: usize) -> Option<(Share, usize)> {
        if !self.start(j) {
            return None;
        }
        let job = &self.jobs[j];
        let State::Prompt(cache) = &job.state else {
            return None;
        };
        let tokens = most.min(job.prompt.len() - cache.len());
        let end = cache.len() + tokens;
        let wants_next = end == job.prompt.len();
        let share = Share {
            job: j,
            tokens,
            wants_next,
            wanted: match job.scores {
                Some(_) => tokens,
                None => usize::from(wants_next),
            },
        };
        let needed = end.div_ceil(KV_BLOCK) - cache.len().div_ceil(KV_BLOCK);
        Some((share, needed))
    }

    /// Takes a piece of a prompt further through the layers, as far as answers under way can bear, and to its end where there are
    /// none. What the piece was if it came to its end: `piece_row` then has the logits behind it, if they are wanted.
    fn read_piece(
        &mut self,
        with: Loaded,
        beside_answers: bool,
        blocks: usize,
    ) -> Result<Option<Share>, GenerateError> {
        let Loaded { model, runtime, .. } = with;
        let begun = match self.begun_piece() {
            None if beside_answers => self.begin_piece(with, blocks)?,
            begun => begun,
        };
        let Some((mut piece, j)) = begun else {
            return Ok(None);
        };
        let job = &mut self.jobs[j];
        let State::Prompt(cache) = &mut job.state else {
            unreachable!("a piece is of a prompt")
        };
        let time = beside_answers.then(|| self.pace.time());
        if !runtime.region(|team| piece.go_on((model, team), cache, time))? {
            self.piece = Some(piece);
            return Ok(None);
        }
        if beside_answers {
            self.pace.slowest_module_took(piece.slowest);
        }
        let share = Share {
            job: j,
            tokens: piece.tokens,
            wants_next: cache.len() == job.prompt.len(),
            wanted: piece.wanted,
        };
        let (scratch, rows) = (&mut piece.scratch, 0..piece.wanted);
        runtime.region(|team| {
            if share.wants_next {
                let last = rows.end - 1..rows.end;
                model.logits(team, Phase::Decode, last, scratch, &mut self.piece_row);
            }
            if let Some(scores) = &mut job.scores {
                scores.take(model, team, scratch, rows);
            }
        });
        self.piece_scratch = piece.scratch;
        Ok(Some(share))
    }

    /// The piece that is on its way and its job, if that is still there.
    fn begun_piece(&mut self) -> Option<(Piece, usize)> {
        let piece = self.piece.take()?;
        match self.jobs.iter().position(|job| job.id == piece.id) {
            Some(j) => Some((piece, j)),
            None => {
                self.piece_scratch = piece.scratch;
                None
            }
        }
    }

    /// Begins the next piece of the first prompt that has one, if there are so many blocks for it.
    fn begin_piece(
        &mut self,
        with: Loaded,
        blocks: usize,
    ) -> Result<Option<(Piece, usize)>, GenerateError> {
        let most = self.pace.tokens();
        let next = (0..self.jobs.len()).find_map(|j| self.next_share(j, most));
        let Some((share, _)) = next.filter(|(_, needed)| *needed <= blocks) else {
            return Ok(None);
        };
        let job = &mut self.jobs[share.job];
        let State::Prompt(cache) = &mut job.state else {
            unreachable!("a share that is read is of a prompt")
        };
        let tokens = &job.prompt[cache.len()..][..share.tokens];
        let what = (job.id, tokens, share.wanted);
        let scratch = std::mem::take(&mut self.piece_scratch);
        let piece = with
            .runtime
            .region(|team| Piece::begin(what, (with.model, team), cache, scratch))?;
        Ok(Some((piece, share.job)))
    }

    /// The end of a job for which there are no blocks.
    fn refused(&self, job: &Job, needed: usize) -> Update {
        Update {
            ended: Some(Err(self.pool.why_not(needed).into())),
            ..Update::new(job.id)
        }
    }

    /// Gives a waiting job its cache, with what others have computed of its prompt; not while another one is computing a block
    /// that it could have. Says whether the job has a cache.
    fn start(&mut self, j: usize) -> bool {
        let job = &self.jobs[j];
        if !matches!(job.state, State::Waiting) {
            return true;
        }
        if job.scores.is_some() {
            // What others have computed has no logits any more.
            let cache = self.pool.cache(job.context);
            self.begin(j, cache);
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
        self.begin(j, cache);
        true
    }

    /// Lets a job's prompt go on behind what is in the cache.
    fn begin(&mut self, j: usize, cache: KvCache) {
        let job = &mut self.jobs[j];
        job.timings.prompt_tokens = job.prompt.len() - cache.len();
        job.since = Instant::now();
        job.state = State::Prompt(cache);
    }

    /// Runs what was shared out. The logits of the rows that want them are then there, in the order of the shares.
    fn run(&mut self, with: Loaded, shares: &[Share]) -> Result<(), GenerateError> {
        let Loaded { model, runtime, .. } = with;
        let Self {
            jobs,
            batch,
            scratch,
            logits,
            row,
            ..
        } = self;
        batch.clear();
        for (s, share) in shares.iter().enumerate() {
            let job = &jobs[share.job];
            match &job.state {
                State::Generating(cache, token) => batch.add_generated(s, cache.len(), *token),
                State::Prompt(cache) => {
                    let (first, n) = (cache.len(), share.tokens);
                    let wanted = n - share.wanted..n;
                    batch.add_prompt(s, first, &job.prompt[first..first + n], wanted);
                }
                State::Waiting => unreachable!("a share is of a job with a cache"),
            }
        }
        // What a job has of a pass: its cache, and where it takes down how likely its prompt is.
        let mut parts: Vec<Option<(&mut KvCache, Option<&mut PromptScores>)>> = jobs
            .iter_mut()
            .map(|job| Some((job.state.cache_mut()?, job.scores.as_mut())))
            .collect();
        let (mut sequences, mut scores) = (Vec::new(), Vec::new());
        for share in shares {
            let (cache, score) = parts[share.job].take().expect("one share for each job");
            sequences.push(cache);
            scores.push(score);
        }
        runtime.region(|team| {
            model.forward(team, batch.rows(), &mut sequences, scratch, &mut Unobserved)?;
            if scores.iter().all(Option::is_none) {
                let wanted = shares.iter().filter(|share| share.wants_next).count();
                model.logits(team, Phase::Decode, 0..wanted, scratch, logits);
                return Ok(());
            }
            // The rows are in the order of the shares.
            let mut end = 0;
            logits.clear();
            for (share, score) in shares.iter().zip(&mut scores) {
                let rows = end..end + share.wanted;
                end = rows.end;
                if share.wants_next {
                    model.logits(team, Phase::Decode, end - 1..end, scratch, row);
                    logits.extend_from_slice(row);
                }
                if let Some(score) = score {
                    score.take(model, team, scratch, rows);
                }
            }
            Ok(())
        })
    }

    /// Chooses the next token of every answer whose logits are there.
    fn choose(&mut self, with: Loaded, shares: &[Share], told: &mut Vec<Update>) {
        let mut rows = self.logits.chunks_exact(with.model.config.vocabulary);
        for share in shares {
            let job = &mut self.jobs[share.job];
            let Some(cache) = job.state.cache() else {
                continue;
            };
            if let State::Prompt(cache) = &job.state {
                cache.share(&job.prompt[..cache.len()]);
            }
            if !share.wants_next {
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
            let mut update = Update::new(job.id);
            let scores = job.scores.as_ref().map_or(&[][..], PromptScores::scores);
            if is_prompt {
                update.prompt_logprobs = scores.to_vec();
            }
            let checked = job.scores.as_ref().map_or(Ok(()), PromptScores::check);
            match checked.and_then(|()| job.answer.next(with.tokenizer, logits, position, room)) {
                Ok(next) => {
                    update.text = next.text;
                    update.token = next.token;
                    if next.token.is_some() {
                        update.logprob = job.answer.logprobs().last().cloned();
                    }
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
                            let scores = scores.to_vec();
                            let generated = job.answer.generated(finish, job.timings, scores);
                            update.ended = Some(Ok(generated));
                        }
                    }
                }
                Err(error) => update.ended = Some(Err(error)),
            }
            told.push(update);
        }
    }
}
