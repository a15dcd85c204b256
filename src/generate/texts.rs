//! Many texts at once, of what the model itself finds likely: texts that begin anywhere, and answers to prompts.

use std::collections::VecDeque;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::{GenerateError, Sampler, SamplerConfig};
use crate::kernels::{KV_BLOCK, Phase, Runtime};
use crate::memory::Memory;
use crate::model::{Batch, CacheType, KvCache, KvPool, Model, Scratch, Unobserved};
use crate::progress::{Progress, report};

/// Texts that go through the model together at most: with more, reading the weights no longer counts.
const AT_ONCE: usize = 64;
/// What their caches may take, in bytes, if the model itself is not larger than twice this, and half of the memory that is there not
/// smaller.
const CACHES: usize = 512 << 20;

/// The seeds of answers begin so far behind those of other texts, so that neither change with the number of the others.
const ANSWERS: u64 = 1 << 32;

/// What to write.
#[derive(Debug, Clone, Copy)]
pub struct Texts<'a> {
    /// Texts that begin anywhere. They come first.
    pub count: usize,
    /// Texts of answers to prompts. They come behind the others.
    pub answers: Answers<'a>,
    /// Tokens of each, all included. A text goes on behind the tokens that end turns or documents.
    pub tokens: usize,
    /// Stands in front of every text, where the model wants one.
    pub bos: Option<u32>,
    /// Each text begins with one of these, drawn evenly. From the same beginning a model tells the same few stories; from any
    /// token of its vocabulary it tells of everything (Liu et al., "LLM-QAT", arXiv 2305.17888, section 3.1).
    pub starts: &'a [u32],
    /// Tokens that stand for something: what the model's output has behind them is never chosen.
    pub vocabulary: usize,
    /// The same seed gives the same texts, whatever the number of threads.
    pub seed: u64,
}

/// Texts in which prompts are answered: a prompt, what the model says to it, and where it ends its answer the next prompt.
#[derive(Debug, Clone, Copy, Default)]
pub struct Answers<'a> {
    pub count: usize,
    /// The prompts as the model is given them, without what stands in front of every text. The texts take them in turns.
    pub prompts: &'a [Vec<u32>],
    /// Tokens that end an answer, in order.
    pub ends: &'a [u32],
}

impl Texts<'_> {
    /// Lets the model write, each token drawn with the probability that the model gives it (temperature 1).
    ///
    /// The tokens go through the model as those of prompts do, which many texts side by side make the cheaper way.
    ///
    /// `progress` is called with the number of tokens done and their total.
    ///
    /// # Errors
    /// If a token is not in the model's vocabulary; if a logit is not a number; if it was cancelled.
    ///
    /// # Panics
    /// If there is no token to begin with, or no prompt to answer.
    pub fn write(
        &self,
        model: &Model,
        runtime: &Runtime,
        progress: &mut Progress,
    ) -> Result<Vec<Vec<u32>>, GenerateError> {
        let pool = KvPool::new(model, CacheType::F16)?;
        let all = self.count + self.answers.count;
        let at_once = self.at_once(model, &pool);
        let (mut batch, mut scratch, mut logits) = (Batch::new(), Scratch::new(), Vec::new());
        let mut waiting = 0..all;
        let mut texts: Vec<Vec<u32>> = vec![Vec::new(); all];
        let mut under_way: Vec<Text> = Vec::new();
        let mut caches: Vec<KvCache> = Vec::new();
        let mut done = 0;
        loop {
            while under_way.len() < at_once
                && let Some(number) = waiting.next()
            {
                under_way.push(Text::new(self, number));
                caches.push(pool.cache(self.tokens));
            }
            // What is whole makes room for others.
            for i in (0..under_way.len()).rev() {
                if under_way[i].tokens.len() >= self.tokens {
                    let text = under_way.remove(i);
                    caches.remove(i);
                    done += text.tokens.len();
                    texts[text.number] = text.tokens;
                }
            }
            let begun: usize = under_way.iter().map(|text| text.tokens.len()).sum();
            report(progress, done + begun, self.tokens * all)?;
            match (under_way.is_empty(), waiting.is_empty()) {
                (true, true) => return Ok(texts),
                (true, false) => continue,
                (false, _) => {}
            }
            batch.clear();
            for (i, text) in under_way.iter().enumerate() {
                let (read, rows) = (text.read, text.unread().len());
                batch.add_prompt(i, read, text.unread(), rows - 1..rows);
            }
            let count = under_way.len();
            let mut sequences: Vec<&mut KvCache> = caches.iter_mut().collect();
            runtime.region(|team| -> Result<(), GenerateError> {
                model.forward(
                    team,
                    batch.rows(),
                    &mut sequences,
                    &mut scratch,
                    &mut Unobserved,
                )?;
                model.logits(team, Phase::Prefill, 0..count, &mut scratch, &mut logits);
                let rows = logits.chunks_exact(model.config.vocabulary);
                let mut rows: Vec<(&mut Text, &[f32])> = under_way.iter_mut().zip(rows).collect();
                team.chunks_mut(&mut rows, 1, |_, row| {
                    let (text, logits) = &mut row[0];
                    let known = self.vocabulary.min(logits.len());
                    text.go_on(self, &logits[..known]);
                });
                Ok(())
            })?;
            if let Some(text) = under_way.iter().find(|text| text.failed) {
                let position = text.tokens.len() - 1;
                return Err(GenerateError::NotANumber { position });
            }
        }
    }

    /// How many texts there is memory for side by side.
    fn at_once(&self, model: &Model, pool: &KvPool) -> usize {
        let cache = pool.block_bytes() * self.tokens.div_ceil(KV_BLOCK);
        let half = Memory::now().map_or(u64::MAX, |memory| memory.for_new() / 2);
        let half = usize::try_from(half).unwrap_or(usize::MAX);
        let room = CACHES.max(model.bytes() / 2).min(half) / cache.max(1);
        room.clamp(1, AT_ONCE)
    }
}

/// A text in the making.
struct Text {
    number: usize,
    tokens: Vec<u32>,
    /// How many of them have been through the model.
    read: usize,
    /// The numbers of prompts that come where an answer ends.
    prompts: VecDeque<usize>,
    sampler: Sampler,
    failed: bool,
}

impl Text {
    fn new(texts: &Texts, number: usize) -> Self {
        // Neighbouring seeds give unrelated numbers.
        let nth = number.checked_sub(texts.count);
        let seed = texts.seed.wrapping_add(match nth {
            None => number as u64,
            Some(nth) => ANSWERS + nth as u64,
        });
        let mut text = Self {
            number,
            tokens: texts.bos.into_iter().collect(),
            read: 0,
            prompts: VecDeque::new(),
            sampler: Sampler::new(SamplerConfig::plain(seed)),
            failed: false,
        };
        match nth {
            None => {
                let mut random = ChaCha8Rng::seed_from_u64(!seed);
                let start = (random.next_u64() % texts.starts.len() as u64) as usize;
                text.tokens.push(texts.starts[start]);
            }
            Some(nth) => {
                let prompts = texts.answers.prompts.len();
                // The next prompts of a text are the first ones of texts far away.
                let stride = (prompts as f64 * 0.382).ceil() as usize;
                let turns = (0..prompts).map(|turn| (nth + turn * stride) % prompts);
                text.prompts.extend(turns);
                text.ask(texts);
            }
        }
        text.tokens.truncate(texts.tokens);
        text
    }

    /// The tokens that have not been through the model yet, one at least.
    fn unread(&self) -> &[u32] {
        &self.tokens[self.read..]
    }

    /// Puts the next prompt behind what is there.
    fn ask(&mut self, texts: &Texts) {
        self.prompts.rotate_left(1);
        let next = self.prompts[self.prompts.len() - 1];
        self.tokens.extend(&texts.answers.prompts[next]);
    }

    /// Takes the next token, and behind an answer the next prompt.
    fn go_on(&mut self, texts: &Texts, logits: &[f32]) {
        self.read = self.tokens.len();
        let Some(token) = self.sampler.sample(logits, &[]) else {
            self.failed = true;
            return;
        };
        self.tokens.push(token);
        let answers = !self.prompts.is_empty();
        if answers && texts.answers.ends.binary_search(&token).is_ok() {
            self.ask(texts);
            self.tokens.truncate(texts.tokens);
        }
    }
}
