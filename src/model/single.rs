//! A layer by itself, with weights of its own: for trying out what a change to one layer does while the model stays as it is.

use half::f16;

use super::{Model, Weight};
use crate::gguf::Map;
use crate::kernels::{Runtime, Team};
use crate::quant::{BlockType, Layout, encode_row};

impl Model {
    /// A model of layer l alone, without embedding and head, in half precision. `change(projection, row, values)` is shown every row of
    /// the seven projections, in the order of [`Layer::linears`](super::Layer::linears), to change its values.
    ///
    /// # Errors
    /// If the system has no memory for it.
    pub(crate) fn layer_alone(
        &self,
        runtime: &Runtime,
        l: usize,
        change: impl Fn(usize, usize, &mut [f32]) + Sync,
    ) -> std::io::Result<Self> {
        let mut layer = self.layers[l].clone();
        let mut end = 0;
        for linear in layer.linears_mut() {
            let weight = &mut linear.weight;
            weight.block_type = BlockType::F16;
            weight.layout = Layout::Native;
            weight.range = end..end + weight.rows * weight.row_bytes();
            end = weight.range.end;
        }
        let mut map = Map::anonymous(end.max(1))?;
        for (i, linear) in layer.linears().into_iter().enumerate() {
            let source = &self.layers[l].linears()[i].weight;
            let weight = &linear.weight;
            if weight.range.is_empty() {
                continue;
            }
            let bytes = &mut map.bytes_mut()[weight.range.clone()];
            runtime.region(|team: &Team| {
                team.chunks_mut(bytes, weight.row_bytes(), |row, bytes| {
                    let mut values = vec![0.0; weight.cols];
                    source.decode_row(&self.map, row, &mut values);
                    change(i, row, &mut values);
                    let most = f16::MAX.to_f32();
                    values.iter_mut().for_each(|v| *v = v.clamp(-most, most));
                    encode_row(BlockType::F16, &values, bytes);
                });
            });
        }
        Ok(Self {
            path: self.path.clone(),
            config: self.config.clone(),
            map,
            embedding: Weight {
                rows: 0,
                range: 0..0,
                ..self.embedding.clone()
            },
            layers: vec![layer],
            output_norm: self.output_norm.clone(),
            output: None,
            warnings: Vec::new(),
        })
    }
}
