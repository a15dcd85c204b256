//! A text as sequences of one length: some are held back, the others come batch by batch, in a new order each time that all have been.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Tokens of a sequence at the most.
pub const LENGTH: usize = 256;
/// Sequences of a batch.
pub const BATCH: usize = 4;
/// Sequences that are held back: an eighth, but not more than these.
const HELD_BACK: usize = 8;

/// The tokens of a text as `[sequences, length]`, and the length. `bos` stands in front of every sequence; what is no whole sequence is left out.
pub(super) fn cut(text: &[u32], bos: Option<u32>, context: usize) -> (Vec<u32>, usize) {
    let length = LENGTH.min(context);
    let own = length - usize::from(bos.is_some());
    let sequences = text.chunks_exact(own.max(1)).filter(|_| own > 0);
    let tokens = sequences.flat_map(|s| bos.iter().chain(s).copied());
    (tokens.collect(), length)
}

/// Sequences of a text.
#[derive(Debug)]
pub struct Sequences {
    /// `[sequences, length]`
    tokens: Vec<u32>,
    /// Tokens of each.
    pub length: usize,
    held_back: usize,
    seed: u64,
    /// The last order that was asked for, and its number.
    order: (Option<usize>, Vec<usize>),
}

impl Sequences {
    /// Cuts a text; `bos` stands in front of every sequence. `None` if there are not two.
    pub fn new(text: &[u32], bos: Option<u32>, context: usize, seed: u64) -> Option<Self> {
        let (tokens, length) = cut(text, bos, context);
        if tokens.len() < 2 * length {
            return None;
        }
        let held_back = (tokens.len() / length / 8).clamp(1, HELD_BACK);
        Some(Self {
            tokens,
            length,
            held_back,
            seed,
            order: (None, Vec::new()),
        })
    }

    fn trained(&self) -> usize {
        self.tokens.len() / self.length - self.held_back
    }

    /// Those that are not trained on.
    pub fn held_back(&self) -> &[u32] {
        &self.tokens[self.trained() * self.length..]
    }

    /// Tokens of a batch.
    pub fn batch_tokens(&self) -> usize {
        BATCH * self.length
    }

    /// The tokens of a batch, by its number.
    pub fn batch(&mut self, number: usize) -> Vec<u32> {
        let trained = self.trained();
        let mut tokens = Vec::with_capacity(self.batch_tokens());
        for i in number * BATCH..(number + 1) * BATCH {
            let epoch = i / trained;
            if self.order.0 != Some(epoch) {
                let mut order: Vec<usize> = (0..trained).collect();
                let mut random = ChaCha8Rng::seed_from_u64(self.seed);
                random.set_stream(epoch as u64);
                order.shuffle(&mut random);
                self.order = (Some(epoch), order);
            }
            let at = self.order.1[i % trained] * self.length;
            tokens.extend_from_slice(&self.tokens[at..at + self.length]);
        }
        tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sequence_comes_once_before_any_comes_again() {
        let text: Vec<u32> = (0..255 * 40).collect();
        let mut sequences = Sequences::new(&text, Some(7), 4096, 1).unwrap();
        assert_eq!(
            (sequences.length, sequences.held_back().len()),
            (256, 5 * 256)
        );
        let mut firsts = Vec::new();
        for number in 0..35 {
            let batch = sequences.batch(number);
            assert!(
                batch.len() == 4 * 256 && batch[256] == 7,
                "each begins with its token"
            );
            firsts.extend(batch.chunks(256).map(|s| s[1] / 255));
        }
        for epoch in firsts.chunks(35) {
            let mut all = epoch.to_vec();
            all.sort();
            assert_eq!(all, (0..35).collect::<Vec<u32>>());
        }
        assert_ne!(firsts[..35], firsts[35..70]);
        let mut again = Sequences::new(&text, Some(7), 4096, 1).unwrap();
        assert_eq!(
            again.batch(20),
            sequences.batch(20),
            "in any order of asking"
        );
        let mut other = Sequences::new(&text, Some(7), 4096, 2).unwrap();
        assert_ne!(other.batch(0), sequences.batch(0));
        assert!(Sequences::new(&text[..509], Some(7), 4096, 1).is_none());
    }
}
