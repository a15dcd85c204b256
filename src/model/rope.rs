//! Rotary position embedding: Su et al., "RoFormer", arXiv 2104.09864.

use std::sync::OnceLock;

/// Positions of the first table.
const FIRST_TABLE: usize = 512;
/// Each table has twice as many positions as the one before, so that these reach further than any context.
const TABLES: usize = 40;

/// How fast each pair of a head turns: base^(−2i / dim) / scale / factor_i radians per position, for pairs i < dim / 2; and the
/// angles of the positions that were asked for so far, which all sequences share.
#[derive(Debug, Clone)]
pub struct Rope {
    frequencies: Vec<f64>,
    /// Table t has positions (2^t − 1) · [`FIRST_TABLE`] and on.
    tables: [OnceLock<Angles>; TABLES],
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
        let table = (position / FIRST_TABLE + 1).ilog2() as usize;
        let first = ((1 << table) - 1) * FIRST_TABLE;
        let angles = self.tables[table].get_or_init(|| self.angles(first, FIRST_TABLE << table));
        let pairs = self.frequencies.len();
        let range = (position - first) * pairs..(position - first + 1) * pairs;
        (&angles.cosines[range.clone()], &angles.sines[range])
    }

    fn angles(&self, first: usize, positions: usize) -> Angles {
        let len = positions * self.frequencies.len();
        let (mut cosines, mut sines) = (Vec::with_capacity(len), Vec::with_capacity(len));
        for position in first..first + positions {
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
        assert!(rope.tables[8].get().is_none(), "tables are made as needed");
    }
}
