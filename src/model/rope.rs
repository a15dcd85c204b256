//! Rotary position embedding: Su et al., "RoFormer", arXiv 2104.09864; stretched as in Peng et al., "YaRN", arXiv 2309.00071, and Ding et
//! al., "LongRoPE", arXiv 2402.13753.

use std::sync::OnceLock;

/// Positions whose angles are computed together, when the first of them is asked for.
const PIECE: usize = 512;
/// Each table has twice as many pieces as the one before, so that these reach further than any context.
const TABLES: usize = 40;

/// How rotary embedding is stretched.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scaling {
    /// Positions are divided by this; 1 for none.
    pub factor: f32,
    /// Slow pairs are stretched, and fast ones are not; `None` where all are.
    pub yarn: Option<Yarn>,
    /// What cosines and sines are multiplied by.
    pub magnitude: f32,
    /// The context that the model was trained for before it was stretched.
    pub original_context: usize,
}

impl Scaling {
    pub const NONE: Self = Self {
        factor: 1.0,
        yarn: None,
        magnitude: 1.0,
        original_context: usize::MAX,
    };
}

/// YaRN's ramp between pairs that turn at least `beta_fast` times in the original context, and those that turn at most `beta_slow` times.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// How much of it is applied: 1 for all.
    pub extrapolated: f32,
    pub beta_fast: f32,
    pub beta_slow: f32,
}

/// Divisors of the frequencies, one for each pair.
#[derive(Debug, Clone, Copy)]
pub enum Factors<'a> {
    None,
    /// The same for all contexts (Llama 3's `rope_freqs.weight`).
    All(&'a [f32]),
    /// For contexts up to the original one, and for longer ones.
    ByContext {
        short: &'a [f32],
        long: &'a [f32],
    },
}

/// The angles by which queries and keys are turned.
#[derive(Debug)]
pub struct Rope {
    angles: Angles,
    /// The longest context for which these are the angles, and those for longer ones; `None` if these are for all.
    beyond: Option<(usize, Angles)>,
}

impl Rope {
    /// # Panics
    /// If there are factors, but not as many as pairs.
    pub fn new(dim: usize, base: f32, scaling: &Scaling, factors: Factors) -> Self {
        let with = |factors: Option<&[f32]>| Angles::new(dim, base, scaling, factors);
        match factors {
            Factors::None => Self::of(with(None)),
            Factors::All(factors) => Self::of(with(Some(factors))),
            Factors::ByContext { short, long } => Self {
                angles: with(Some(short)),
                beyond: Some((scaling.original_context, with(Some(long)))),
            },
        }
    }

    fn of(angles: Angles) -> Self {
        Self {
            angles,
            beyond: None,
        }
    }

    /// The longest context with the angles of short ones; `None` where the angles are the same for all.
    pub fn longest_short(&self) -> Option<usize> {
        self.beyond.as_ref().map(|(longest, _)| *longest)
    }

    /// The angles in a context of so many positions.
    pub fn within(&self, context: usize) -> &Angles {
        match &self.beyond {
            Some((longest, long)) if context > *longest => long,
            _ => &self.angles,
        }
    }
}

/// How fast each pair of a head turns, in radians per position: base^(−2i / dim) / factor_i for pairs i < dim / 2, stretched; and the
/// angles of the positions that were asked for so far, which all sequences share.
#[derive(Debug)]
pub struct Angles {
    frequencies: Vec<f64>,
    magnitude: f64,
    /// Table t has the pieces from 2^t − 1 on. A piece takes memory only when it is there.
    tables: [OnceLock<Box<[OnceLock<Piece>]>>; TABLES],
}

/// The cosines and sines of the angles of some positions, `[positions, pairs]` each.
#[derive(Debug)]
struct Piece {
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl Angles {
    fn new(dim: usize, base: f32, scaling: &Scaling, factors: Option<&[f32]>) -> Self {
        let (pairs, base) = (dim / 2, f64::from(base));
        assert!(
            factors.is_none_or(|f| f.len() == pairs),
            "a factor per pair"
        );
        let frequencies = (0..pairs)
            .map(|i| {
                let plain = base.powf(-2.0 * i as f64 / dim as f64)
                    / factors.map_or(1.0, |f| f64::from(f[i]));
                let stretched = plain / f64::from(scaling.factor);
                let kept = scaling.yarn.map_or(0.0, |yarn| {
                    yarn.kept(i, dim, base, scaling.original_context)
                });
                stretched * (1.0 - kept) + plain * kept
            })
            .collect();
        Self {
            frequencies,
            magnitude: f64::from(scaling.magnitude),
            tables: std::array::from_fn(|_| OnceLock::new()),
        }
    }

    /// Cosines and sines of the angles of one position, one of each per pair.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let piece = position / PIECE;
        let table = (piece + 1).ilog2() as usize;
        let pieces = self.tables[table]
            .get_or_init(|| (0..1usize << table).map(|_| OnceLock::new()).collect());
        let angles = pieces[piece + 1 - (1 << table)].get_or_init(|| self.piece(piece * PIECE));
        let pairs = self.frequencies.len();
        let range = position % PIECE * pairs..(position % PIECE + 1) * pairs;
        (&angles.cosines[range.clone()], &angles.sines[range])
    }

    /// Those of a piece, from its first position.
    fn piece(&self, first: usize) -> Piece {
        let len = PIECE * self.frequencies.len();
        let (mut cosines, mut sines) = (Vec::with_capacity(len), Vec::with_capacity(len));
        for position in first..first + PIECE {
            for frequency in &self.frequencies {
                let (sine, cosine) = (position as f64 * frequency).sin_cos();
                cosines.push((self.magnitude * cosine) as f32);
                sines.push((self.magnitude * sine) as f32);
            }
        }
        Piece { cosines, sines }
    }
}

impl Yarn {
    /// How much of its own frequency pair i keeps, from 0 to 1.
    fn kept(&self, i: usize, dim: usize, base: f64, original_context: usize) -> f64 {
        // The pair that turns so often in the original context.
        let pair = |turns: f32| {
            let context = original_context as f64;
            let ratio = context / (f64::from(turns) * std::f64::consts::TAU);
            dim as f64 * ratio.ln() / (2.0 * base.ln())
        };
        let low = pair(self.beta_fast).floor().max(0.0);
        let high = pair(self.beta_slow).ceil().min(dim as f64 - 1.0);
        let along = (i as f64 - low) / (high - low).max(0.001);
        (1.0 - along.clamp(0.0, 1.0)) * f64::from(self.extrapolated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_has_its_own_angles_in_whatever_table_it_lies() {
        let scaling = Scaling {
            factor: 2.0,
            ..Scaling::NONE
        };
        let rope = Rope::new(8, 10_000.0, &scaling, Factors::None);
        let angles = rope.within(usize::MAX);
        for position in [0, 1, 511, 512, 513, 1535, 1536, 3583, 3584, 100_000] {
            let (cosines, sines) = angles.at(position);
            for pair in 0..4 {
                let angle = position as f64 / 2.0 * 10_000f64.powf(-2.0 * pair as f64 / 8.0);
                assert!((f64::from(cosines[pair]) - angle.cos()).abs() < 1e-6);
                assert!((f64::from(sines[pair]) - angle.sin()).abs() < 1e-6);
            }
        }
        let made = angles.tables.iter().filter_map(OnceLock::get).flatten();
        let made = made.filter(|piece| piece.get().is_some()).count();
        assert_eq!(made, 7, "pieces are made as they are needed");
    }

    #[test]
    fn contexts_beyond_the_original_one_have_their_own_factors() {
        let scaling = Scaling {
            magnitude: 1.5,
            original_context: 4,
            ..Scaling::NONE
        };
        let factors = Factors::ByContext {
            short: &[1.0, 2.0],
            long: &[1.0, 8.0],
        };
        let rope = Rope::new(4, 10_000.0, &scaling, factors);
        assert_eq!(rope.longest_short(), Some(4));
        for (context, factor) in [(1, 2.0), (4, 2.0), (5, 8.0)] {
            let (cosines, _) = rope.within(context).at(300);
            let expected = 1.5 * (300.0f64 * 0.01 / factor).cos();
            assert!((f64::from(cosines[1]) - expected).abs() < 1e-6, "{context}");
        }
    }
}
