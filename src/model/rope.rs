//! Rotary position embedding: Su et al., "RoFormer", arXiv 2104.09864.

/// How fast each pair of a head turns: base^(−2i / dim) / scale / factor_i radians per position, for pairs i < dim / 2.
#[derive(Debug, Clone)]
pub struct Rope {
    frequencies: Vec<f64>,
}

/// The angles of a run of positions from 0 on, as cosines and sines.
#[derive(Debug, Clone)]
pub struct Angles {
    pairs: usize,
    /// `[positions, pairs]`
    cosines: Vec<f32>,
    /// `[positions, pairs]`
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
        Self { frequencies }
    }

    /// The angles of positions 0 to `positions` − 1.
    pub fn angles(&self, positions: usize) -> Angles {
        let pairs = self.frequencies.len();
        let mut cosines = Vec::with_capacity(positions * pairs);
        let mut sines = Vec::with_capacity(positions * pairs);
        for position in 0..positions {
            for frequency in &self.frequencies {
                let (sine, cosine) = (position as f64 * frequency).sin_cos();
                cosines.push(cosine as f32);
                sines.push(sine as f32);
            }
        }
        Angles {
            pairs,
            cosines,
            sines,
        }
    }
}

impl Angles {
    /// Cosines and sines of one position, one of each per pair.
    ///
    /// # Panics
    /// If the table does not reach so far.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.pairs..(position + 1) * self.pairs;
        (&self.cosines[range.clone()], &self.sines[range])
    }
}
