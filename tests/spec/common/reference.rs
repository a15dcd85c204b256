//! LLaMA's forward pass once more: in double precision, without a cache, from the definitions, sharing nothing with the
//! crate.

/// y = W x + b, W `[rows, cols]`.
#[derive(Clone)]
pub struct ReferenceLinear {
    pub rows: usize,
    pub cols: usize,
    pub weight: Vec<f64>,
    pub bias: Option<Vec<f64>>,
}

#[derive(Clone)]
pub struct ReferenceLayer {
    pub attention_norm: Vec<f64>,
    pub mlp_norm: Vec<f64>,
    pub heads: usize,
    pub kv_heads: usize,
    pub q: ReferenceLinear,
    pub k: ReferenceLinear,
    pub v: ReferenceLinear,
    pub o: ReferenceLinear,
    pub gate: ReferenceLinear,
    pub up: ReferenceLinear,
    pub down: ReferenceLinear,
}

#[derive(Clone)]
pub struct ReferenceModel {
    pub embedding_length: usize,
    pub head_dim: usize,
    pub rope_dim: usize,
    pub rope_base: f64,
    pub rope_scale: f64,
    pub rope_factors: Option<Vec<f64>>,
    pub epsilon: f64,
    pub embedding: Vec<f64>,
    pub output: Option<Vec<f64>>,
    pub output_norm: Vec<f64>,
    pub layers: Vec<ReferenceLayer>,
}

/// The inputs of a layer's two output projections, a row per token.
#[derive(Clone, Default)]
pub struct Inputs {
    pub attention: Vec<Vec<f64>>,
    pub mlp: Vec<Vec<f64>>,
}

impl ReferenceLinear {
    pub fn apply(&self, x: &[f64]) -> Vec<f64> {
        assert_eq!(x.len(), self.cols);
        (0..self.rows)
            .map(|i| {
                let row = &self.weight[i * self.cols..(i + 1) * self.cols];
                let product: f64 = row.iter().zip(x).map(|(w, x)| w * x).sum();
                product + self.bias.as_ref().map_or(0.0, |b| b[i])
            })
            .collect()
    }

    /// Sets the columns to 0.
    pub fn mask_columns(&mut self, columns: &[usize]) {
        for i in 0..self.rows {
            for &j in columns {
                self.weight[i * self.cols + j] = 0.0;
            }
        }
    }

    pub fn add_bias(&mut self, addition: &[f64]) {
        let bias = self.bias.get_or_insert_with(|| vec![0.0; addition.len()]);
        bias.iter_mut().zip(addition).for_each(|(b, a)| *b += a);
    }
}

impl ReferenceModel {
    /// The logits of every token, `[tokens, vocabulary]`, and what each layer's output projections saw.
    pub fn forward(&self, tokens: &[u32]) -> (Vec<f64>, Vec<Inputs>) {
        let d = self.embedding_length;
        let mut stream: Vec<Vec<f64>> = tokens
            .iter()
            .map(|t| self.embedding[*t as usize * d..(*t as usize + 1) * d].to_vec())
            .collect();
        let mut inputs = Vec::new();
        for layer in &self.layers {
            let normed: Vec<Vec<f64>> = stream
                .iter()
                .map(|x| self.rms_norm(x, &layer.attention_norm))
                .collect();
            let attended = self.attention(layer, &normed);
            for (x, a) in stream.iter_mut().zip(&attended) {
                add(x, &layer.o.apply(a));
            }
            let mut hidden = Vec::new();
            for x in &mut stream {
                let normed = self.rms_norm(x, &layer.mlp_norm);
                let gate = layer.gate.apply(&normed);
                let up = layer.up.apply(&normed);
                let h: Vec<f64> = gate
                    .iter()
                    .zip(&up)
                    .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                    .collect();
                add(x, &layer.down.apply(&h));
                hidden.push(h);
            }
            inputs.push(Inputs {
                attention: attended,
                mlp: hidden,
            });
        }
        let head = self.output.as_ref().unwrap_or(&self.embedding);
        let logits = stream
            .iter()
            .flat_map(|x| {
                let x = self.rms_norm(x, &self.output_norm);
                head.chunks_exact(d)
                    .map(move |row| row.iter().zip(&x).map(|(w, x)| w * x).sum())
                    .collect::<Vec<f64>>()
            })
            .collect();
        (logits, inputs)
    }

    fn rms_norm(&self, x: &[f64], weight: &[f64]) -> Vec<f64> {
        let mean_square = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean_square + self.epsilon).sqrt();
        x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
    }

    fn attention(&self, layer: &ReferenceLayer, normed: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let e = self.head_dim;
        let project = |linear: &ReferenceLinear, rotate: bool| -> Vec<Vec<f64>> {
            normed
                .iter()
                .enumerate()
                .map(|(position, x)| {
                    let mut y = linear.apply(x);
                    if rotate {
                        y.chunks_exact_mut(e)
                            .for_each(|head| self.rotate(head, position));
                    }
                    y
                })
                .collect()
        };
        let (q, k, v) = (
            project(&layer.q, true),
            project(&layer.k, true),
            project(&layer.v, false),
        );
        (0..normed.len())
            .map(|t| {
                (0..layer.heads)
                    .flat_map(|h| {
                        let g = h * layer.kv_heads / layer.heads;
                        let head = |x: &[f64], h: usize| x[h * e..(h + 1) * e].to_vec();
                        let query = head(&q[t], h);
                        let scores: Vec<f64> = (0..=t)
                            .map(|s| {
                                let key = head(&k[s], g);
                                let dot: f64 = query.iter().zip(&key).map(|(a, b)| a * b).sum();
                                (dot / (e as f64).sqrt()).exp()
                            })
                            .collect();
                        let total: f64 = scores.iter().sum();
                        let mut out = vec![0.0; e];
                        for (s, score) in scores.iter().enumerate() {
                            for (o, v) in out.iter_mut().zip(head(&v[s], g)) {
                                *o += score / total * v;
                            }
                        }
                        out
                    })
                    .collect()
            })
            .collect()
    }

    fn rotate(&self, head: &mut [f64], position: usize) {
        for i in 0..self.rope_dim / 2 {
            let factor = self.rope_factors.as_ref().map_or(1.0, |f| f[i]);
            let frequency = self
                .rope_base
                .powf(-((2 * i) as f64) / self.rope_dim as f64);
            let angle = position as f64 / self.rope_scale * frequency / factor;
            let (a, b) = (head[2 * i], head[2 * i + 1]);
            head[2 * i] = a * angle.cos() - b * angle.sin();
            head[2 * i + 1] = a * angle.sin() + b * angle.cos();
        }
    }
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
