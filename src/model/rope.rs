//! Rotary position embedding: Su et al., "RoFormer", arXiv 2104.09864.

/// Angles for every position: cosines and sines of p / scale · base^(−2i / dim) / factor_i, for pairs i < dim / 2.
#[derive(Debug, Clone)]
pub struct Rope {
    /// Radians per position of each pair, with scaling and factors in it.
    frequencies: Vec<f64>,
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
        assert!(factors.is_none_or(|f| f.len() == pairs), "a factor per pair");
        let frequencies = (0..pairs)
            .map(|i| {
                let plain = f64::from(base).powf(-2.0 * i as f64 / dim as f64);
                plain / f64::from(scale) / factors.map_or(1.0, |f| f64::from(f[i]))
            })
            .collect();
        Self {
            frequencies,
            cosines: Vec::new(),
            sines: Vec::new(),
        }
    }

    /// Makes the angles of all positions below `positions` ready.
    pub fn prepare(&mut self, positions: usize) {
        let pairs = self.frequencies.len();
        let ready = self.cosines.len().checked_div(pairs).unwrap_or(positions);
        for position in ready..positions {
            for frequency in &self.frequencies {
                let (sine, cosine) = (position as f64 * frequency).sin_cos();
                self.cosines.push(cosine as f32);
                self.sines.push(sine as f32);
            }
        }
    }

    /// Cosines and sines of one prepared position, one of each per pair.
    ///
    /// # Panics
    /// If the position was not prepared.
    pub fn angles(&self, position: usize) -> (&[f32], &[f32]) {
        let pairs = self.frequencies.len();
        let range = position * pairs..(position + 1) * pairs;
        (&self.cosines[range.clone()], &self.sines[range])
    }
}
