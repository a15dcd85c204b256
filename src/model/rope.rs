//! Rotary position embedding: Su et al., "RoFormer", arXiv 2104.09864.

use std::sync::OnceLock;

/// Positions whose angles are computed together, when the first of them is asked for.
const PIECE: usize = 512;
/// Each table has twice as many pieces as the one before, so that these reach further than any context.
const TABLES: usize = 40;

/// How fast each pair of a head turns: base^(−2i / dim) / scale / factor_i radians per position, for pairs i < dim / 2; and the
/// angles of the positions that were asked for so far, which all sequences share.
#[derive(Debug, Clone)]
pub struct Rope {
    frequencies: Vec<f64>,
    /// Table t has the pieces from 2^t − 1 on. A piece takes memory only when it is there.
    tables: [OnceLock<Box<[OnceLock<Angles>]>>; TABLES],
}

/// The cosines and sines of the angles of some positions, `[positions, pairs]` each.
#[derive(Debug, Clone)]
struct Angles {
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl Rope {
    /// `factors`: divisors of the frequencies, one for each pair (Llama 3's `rope_freqs.weight`).
    ///
    /// # Panics
    /// If there are factors, but not as many as pairs.
    pub fn new(dim: usize, base: f32, scale: f32, factors: Option<&[f32]>) -> Self {
        let pairs = dim / 2;
        assert!(
            factors.is_none_or(|f| f.len() == pairs),
            "a factor per pair"
        );
        let frequencies = (0..pairs)
            .map(|i| {
                let plain = f64::from(base).powf(-2.0 * i as f64 / dim as f64);
                plain / f64::from(scale) / factors.map_or(1.0, |f| f64::from(f[i]))
            })
            .collect();
        Self {
            frequencies,
            tables: std::array::from_fn(|_| OnceLock::new()),
        }
    }

    /// Cosines and sines of the angles of one position, one of each per pair.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let piece = position / PIECE;
        let table = (piece + 1).ilog2() as usize;
        let pieces = self.tables[table]
            .get_or_init(|| (0..1usize << table).map(|_| OnceLock::new()).collect());
        let angles = pieces[piece + 1 - (1 << table)].get_or_init(|| self.angles(piece * PIECE));
        let pairs = self.frequencies.len();
        let range = position % PIECE * pairs..(position % PIECE + 1) * pairs;
        (&angles.cosines[range.clone()], &angles.sines[range])
    }

    /// Those of a piece, from its first position.
    fn angles(&self, first: usize) -> Angles {
        let len = PIECE * self.frequencies.len();
        let (mut cosines, mut sines) = (Vec::with_capacity(len), Vec::with_capacity(len));
        for position in first..first + PIECE {
            for frequency in &self.frequencies {
                let (sine, cosine) = (position as f64 * frequency).sin_cos();
                cosines.push(cosine as f32);
                sines.push(sine as f32);
            }
        }
        Angles { cosines, sines }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_has_its_own_angles_in_whatever_table_it_lies() {
        let rope = Rope::new(8, 10_000.0, 2.0, None);
        for position in [0, 1, 511, 512, 513, 1535, 1536, 3583, 3584, 100_000] {
            let (cosines, sines) = rope.at(position);
            for pair in 0..4 {
                let angle = position as f64 / 2.0 * 10_000f64.powf(-2.0 * pair as f64 / 8.0);
                assert!((f64::from(cosines[pair]) - angle.cos()).abs() < 1e-6);
                assert!((f64::from(sines[pair]) - angle.sin()).abs() < 1e-6);
            }
        }
        let made = rope.tables.iter().filter_map(OnceLock::get).flatten();
        let made = made.filter(|piece| piece.get().is_some()).count();
        assert_eq!(made, 7, "pieces are made as they are needed");
    }
}
