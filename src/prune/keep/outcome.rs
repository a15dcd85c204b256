//! Outcomes of pruning as files, so that the same can be done again without calibrating, choosing and fitting.
//!
//! An outcome is a plan and what the two projections of each layer that lose columns have become, encoded. Rows only move, so
//! that nothing of them needs to be kept.
//!
//! A file is, all little-endian: the bytes `FLAPDONE`; the version (u32); the length of what follows (u32), a JSON object with
//! the [`OutcomeKey`], the plan, what it did to predictions, and type and number of bytes of the projections; then their bytes, row after row, each with its
//! bias (f32) behind it if it has one, first the attention's and then the MLP's of every layer; the importance (f32) by which matrices were
//! encoded in other types, if any were; the weights that healing has trained, and norms and biases (f32), if it was healed; where single weights
//! went as well, the bytes of all seven projections of every layer, sparse or in the native layout; at the end the SHA-256 of all bytes before.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::format::{Hashing, Numbers, checked, hash_of, read_head, read_header};
use super::rewritten::Rewritten;
use super::single::{self, Single, SingleRecord, StoredSingle};
use crate::count::count;
use crate::files;
use crate::kernels::Runtime;
use crate::model::{Linear, Model};
use crate::progress::Progress;
use crate::prune::apply::{Columns, EncodedProjection, tallied};
use crate::prune::bits::{Importance, KeptTypes};
use crate::prune::choose::{Found, LayerPlan, Plan, Target};
use crate::prune::effect::{Effect, StoredEffect};
use crate::prune::error::{PruneError, PruneErrorKind};
use crate::prune::exact;
use crate::prune::features::features;
use crate::prune::recipe::Recipe;
use crate::quant::{BlockType, Layout, unpack};

const MAGIC: &[u8; 8] = b"FLAPDONE";
/// Goes up whenever the format does, or what pruning computes: an outcome of another version is not used.
pub const VERSION: u32 = 12;

/// What an outcome follows from. Equal keys have equal outcomes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OutcomeKey {
    /// The model's [fingerprint](crate::gguf::GgufFile::fingerprint).
    pub model: String,
    /// The [hash](super::StoredProfile::hash) of the profile.
    pub profile: String,
    pub recipe: Recipe,
    /// What was asked for: a ratio, or what one is to be found by.
    pub target: Target,
    /// Which single weights went afterwards, and by what text; `None` where none did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub single: Option<String>,
    /// How long whole plans were searched; `None` where they were not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plans: Option<String>,
    /// By what types could change; `None` where none could.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub types: Option<String>,
    /// How the model was healed afterwards, and by what text; `None` where it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healed: Option<String>,
    /// The version of flapjack.
    pub flapjack: String,
}

impl OutcomeKey {
    /// The SHA-256 of everything that an outcome follows from, in hexadecimal digits.
    pub fn hash(&self) -> String {
        hash_of(self)
    }
}

/// What pruning has made of a model: enough to do the same again to the dense model.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The ratio that was asked for, or found.
    pub ratio: f64,
    /// What the ratio was found by; `None` where it was asked for itself.
    pub found: Option<Found>,
    pub plan: Plan,
    /// What the attention output and MLP down of every layer have become.
    layers: Vec<[EncodedProjection; 2]>,
    /// What single weights have left; `None` where none went.
    pub single: Option<Single>,
    /// Types that matrices were given then; `None` where none could be.
    pub types: Option<KeptTypes>,
    /// What healing has made of it; `None` where it was not healed.
    pub healed: Option<(HealRecord, Rewritten)>,
    /// What it did to predictions, all in all; none where that was not measured.
    pub effects: Vec<Effect>,
}

/// How healing went.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HealRecord {
    /// Tokens that were trained on.
    pub tokens: usize,
    pub steps: usize,
    /// What the steps took.
    pub seconds: f64,
    /// Tokens that were held back, and the mean divergence of the dense model's predictions from the pruned one's on them, in nats,
    /// before and after.
    pub held_back: usize,
    pub before: f64,
    pub after: f64,
    pub end: HealEnd,
}

/// What became of the weights that were trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HealEnd {
    /// The model has them.
    Healed,
    /// They were not better on what was held back, and the model is as pruning left it.
    NotBetter,
    /// A gradient was not made of numbers; the model is as pruning left it.
    Diverged,
    /// It was cancelled; the model is as pruning left it.
    Cancelled,
}

/// Why an outcome's file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OutcomeError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is of no use ({problem}); it may be deleted")]
    Unusable {
        path: PathBuf,
        problem: &'static str,
    },
}

/// What an outcome's file says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Stated {
    /// The name of the model's file; empty if it was not kept.
    pub model_name: String,
    pub recipe: Recipe,
    pub target: Target,
    pub ratio: f64,
}

/// What the file of an outcome says of itself, without reading the rest; `None` if there is no such file, or none of this format.
pub fn stated(path: &Path) -> Option<Stated> {
    let header: Header = read_head(path, MAGIC, VERSION)?;
    Some(Stated {
        model_name: header.model_name,
        recipe: header.key.recipe,
        target: header.key.target,
        ratio: header.ratio,
    })
}

#[derive(Serialize, Deserialize)]
struct Header {
    key: OutcomeKey,
    /// The name of the model's file, for messages.
    #[serde(default)]
    model_name: String,
    #[serde(with = "exact")]
    ratio: f64,
    found: Option<Found>,
    removed: usize,
    total: usize,
    /// What stays of every layer.
    layers: Vec<StoredLayer>,
    /// The form of every layer's two projections.
    projections: Vec<[StoredProjection; 2]>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    single: Option<(SingleRecord, Vec<StoredSingle>)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    healed: Option<StoredHealed>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    types: Option<StoredTypes>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    effects: Vec<StoredEffect>,
}

/// [`KeptTypes`], with types by their numbers.
#[derive(Serialize, Deserialize)]
struct StoredTypes {
    levels: Vec<Vec<u32>>,
    /// How many numbers each list of importance has: four of each layer, and that of the head. Empty where there are none.
    importance: Vec<usize>,
}

impl StoredTypes {
    fn new(types: &KeptTypes) -> Self {
        let ids = |types: &Vec<BlockType>| types.iter().map(|t| t.id()).collect();
        Self {
            levels: types.levels.iter().map(ids).collect(),
            importance: lists(types).map(<[f32]>::len).collect(),
        }
    }

    /// The types, with the lists that `take` has of so many numbers; `None` if that cannot be.
    fn types(self, mut take: impl FnMut(usize) -> Option<Vec<f32>>) -> Option<KeptTypes> {
        let known = |ids: Vec<u32>| ids.into_iter().map(BlockType::from_id).collect();
        let levels = self.levels.into_iter().map(known).collect::<Option<_>>()?;
        let lists = self.importance.into_iter().map(&mut take);
        let mut lists: Vec<Vec<f32>> = lists.collect::<Option<_>>()?;
        let importance = match lists.pop() {
            None => None,
            Some(head) => {
                let (layers, rest) = lists.as_chunks_mut::<4>();
                rest.is_empty().then_some(())?;
                let layers = layers.iter_mut().map(std::mem::take).collect();
                Some(Importance { layers, head })
            }
        };
        Some(KeptTypes { levels, importance })
    }
}

/// The lists of importance.
fn lists(types: &KeptTypes) -> impl Iterator<Item = &[f32]> {
    let all = types.importance.iter();
    all.flat_map(|all| {
        let layers = all.layers.iter().flatten();
        layers.chain([&all.head]).map(|list| &list[..])
    })
}

#[derive(Serialize, Deserialize)]
struct StoredHealed {
    record: HealRecord,
    /// Bytes of each projection that was written anew.
    matrices: Vec<usize>,
    /// Numbers of norms and biases.
    vectors: usize,
}

/// A [`LayerPlan`], with types by their numbers.
#[derive(Serialize, Deserialize)]
struct StoredLayer {
    heads: Vec<usize>,
    channels: Vec<usize>,
    types: [Option<u32>; 2],
}

impl StoredLayer {
    fn new(plan: &LayerPlan) -> Self {
        Self {
            heads: plan.heads.clone(),
            channels: plan.channels.clone(),
            types: plan.types.map(|new| new.map(BlockType::id)),
        }
    }

    /// The plan; `None` if a type is not known.
    fn plan(self) -> Option<LayerPlan> {
        let known = |id: Option<u32>| match id {
            Some(id) => BlockType::from_id(id).map(Some),
            None => Some(None),
        };
        let [o, down] = self.types;
        Some(LayerPlan {
            heads: self.heads,
            channels: self.channels,
            types: [known(o)?, known(down)?],
        })
    }
}

#[derive(Serialize, Deserialize)]
struct StoredProjection {
    block_type: u32,
    bytes: usize,
    /// How many numbers the bias has; `None` where there is none.
    bias: Option<usize>,
}

impl Outcome {
    /// Takes down what pruning has made of a model. `dense` are the columns that each layer's two projections had before.
    ///
    /// # Panics
    /// If the plan was not made for this model, or a projection that lost columns is sparse.
    pub fn of(
        model: &Model,
        dense: &[[usize; 2]],
        plan: Plan,
        ratio: f64,
        found: Option<Found>,
    ) -> Self {
        assert_eq!(plan.layers.len(), model.layers.len(), "layers of the plan");
        let take = |linear: &Linear, columns_before: usize| {
            let weight = &linear.weight;
            let mut bytes = Vec::new();
            if weight.cols != columns_before {
                assert!(!weight.is_sparse(), "{} is sparse", weight.name);
                bytes.extend_from_slice(&model.map.bytes()[weight.range.clone()]);
                if weight.layout == Layout::Packed {
                    unpack(weight.block_type, weight.cols, &mut bytes);
                }
            }
            EncodedProjection {
                block_type: weight.block_type,
                bytes,
                bias: linear.bias.clone(),
            }
        };
        let layers = model.layers.iter().zip(dense);
        Self {
            ratio,
            found,
            layers: layers
                .map(|(layer, [o, down])| [take(&layer.o, *o), take(&layer.down, *down)])
                .collect(),
            plan,
            single: None,
            types: None,
            healed: None,
            effects: Vec::new(),
        }
    }

    /// Prunes a model as it was done before. The model must be as it was then.
    ///
    /// `progress` counts layers. It is called before the first of them too, where a break leaves the model as it was.
    ///
    /// # Errors
    /// [`PruneErrorKind::OtherShape`] if the outcome cannot be this model's, before anything has changed; if the system does not
    /// take memory back, or `progress` breaks. The error says which layers are pruned by then.
    pub fn apply(
        &self,
        model: &mut Model,
        runtime: &Runtime,
        progress: &mut Progress,
    ) -> Result<(), PruneError> {
        self.check(model)?;
        let layers = self.plan.layers.iter().zip(&self.layers);
        tallied(self.layers.len(), progress, |tally| {
            for (l, (kept, projections)) in layers.enumerate() {
                let columns = projections.each_ref().map(Columns::Encoded);
                tally.apply_layer(model, runtime, l, kept, columns)?;
            }
            Ok(())
        })
    }

    /// Checks everything that applying takes for granted.
    fn check(&self, model: &Model) -> Result<(), PruneErrorKind> {
        let other = |problem: String| Err(PruneErrorKind::OtherShape(problem));
        if self.plan.layers.len() != model.layers.len() {
            return other(format!("it has {}", count(self.plan.layers.len(), "layer")));
        }
        let layers = model.layers.iter().zip(&self.plan.layers);
        for (l, ((layer, kept), [o, down])) in layers.zip(&self.layers).enumerate() {
            let heads = features(&kept.heads, model.config.head_dim).len();
            let rising = |kept: &[usize], count: usize| {
                kept.is_sorted_by(|a, b| a < b) && kept.last().is_none_or(|last| *last < count)
            };
            let fits = |linear: &Linear, new: &EncodedProjection, columns: usize| {
                let weight = &linear.weight;
                let bytes = new.block_type.checked_row_bytes(columns);
                let bytes = bytes.and_then(|bytes| bytes.checked_mul(weight.rows));
                let same = new.bytes.is_empty() && new.block_type == weight.block_type;
                let whole = columns == weight.cols && same;
                (whole || bytes == Some(new.bytes.len()) && new.bytes.len() <= weight.bytes())
                    && new.bias.as_ref().is_none_or(|b| b.len() == weight.rows)
            };
            if !rising(&kept.heads, layer.heads())
                || !rising(&kept.channels, layer.channels())
                || !fits(&layer.o, o, heads)
                || !fits(&layer.down, down, kept.channels.len())
            {
                return other(format!("layer {l} has other widths"));
            }
        }
        Ok(())
    }

    /// Bytes of the projections, which are nearly all of the file. `single` is as for [`Outcome::save`].
    pub fn bytes(&self, single: Option<(&Model, &SingleRecord)>) -> usize {
        let projections = self.layers.iter().flatten();
        let layers = single.map_or(0, |(model, _)| {
            model.layers.iter().map(|layer| layer.bytes()).sum()
        });
        let healed = self
            .healed
            .as_ref()
            .map_or(0, |(_, weights)| weights.bytes());
        let types = self.types.iter().flat_map(lists);
        let types: usize = types.map(size_of_val).sum();
        projections.map(|p| p.bytes.len()).sum::<usize>() + layers + types + healed
    }

    /// Writes the file, whole or not at all. `model_name`, the name of the model's file, is for those who look through files. `single`
    /// is a model that has lost single weights since the outcome was taken down.
    ///
    /// # Errors
    /// [`OutcomeError::Io`].
    pub fn save(
        &self,
        path: &Path,
        key: &OutcomeKey,
        model_name: &str,
        single: Option<(&Model, &SingleRecord)>,
    ) -> Result<(), OutcomeError> {
        files::replace(path, |file| {
            let out = BufWriter::with_capacity(1 << 20, file);
            self.write(out, key, model_name, single)
        })
        .map_err(|source| OutcomeError::Io {
            path: path.to_owned(),
            source,
        })
    }

    fn write(
        &self,
        out: impl Write,
        key: &OutcomeKey,
        model_name: &str,
        single: Option<(&Model, &SingleRecord)>,
    ) -> io::Result<()> {
        let layers = self.plan.layers.iter();
        let header = Header {
            key: key.clone(),
            model_name: model_name.to_owned(),
            ratio: self.ratio,
            found: self.found,
            removed: self.plan.removed,
            total: self.plan.total,
            layers: layers.map(StoredLayer::new).collect(),
            projections: self
                .layers
                .iter()
                .map(|pair| {
                    pair.each_ref().map(|p| StoredProjection {
                        block_type: p.block_type.id(),
                        bytes: p.bytes.len(),
                        bias: p.bias.as_ref().map(Vec::len),
                    })
                })
                .collect(),
            single: single.map(|(model, shares)| (shares.clone(), single::stored(model))),
            types: self.types.as_ref().map(StoredTypes::new),
            healed: self.healed.as_ref().map(|(record, weights)| StoredHealed {
                record: *record,
                matrices: weights.matrices.iter().map(Vec::len).collect(),
                vectors: weights.vectors().len(),
            }),
            effects: self.effects.iter().map(StoredEffect::new).collect(),
        };
        let mut out = Hashing::begin(out, MAGIC, VERSION, &header)?;
        for projection in self.layers.iter().flatten() {
            out.put(&projection.bytes)?;
            if let Some(bias) = &projection.bias {
                out.put_floats(bias)?;
            }
        }
        for list in self.types.iter().flat_map(lists) {
            out.put_floats(list)?;
        }
        if let Some((_, weights)) = &self.healed {
            weights
                .matrices
                .iter()
                .try_for_each(|bytes| out.put(bytes))?;
            out.put_floats(weights.vectors())?;
        }
        if let Some((model, _)) = single {
            single::each(model, |bytes| out.put(bytes))?;
        }
        out.finish().map(drop)
    }

    /// Reads the file of an outcome with this key.
    ///
    /// # Errors
    /// [`OutcomeError`], if it cannot be read, is no outcome, one of another version or key, or damaged.
    pub fn load(path: &Path, key: &OutcomeKey) -> Result<Self, OutcomeError> {
        let bytes = std::fs::read(path).map_err(|source| OutcomeError::Io {
            path: path.to_owned(),
            source,
        })?;
        Self::from_bytes(bytes, key).map_err(|problem| OutcomeError::Unusable {
            path: path.to_owned(),
            problem,
        })
    }

    fn from_bytes(file: Vec<u8>, key: &OutcomeKey) -> Result<Self, &'static str> {
        let bytes = &file[..];
        const ODD: &str = "its parts do not fit each other";
        let start = [&MAGIC[..], &VERSION.to_le_bytes()].concat();
        if !bytes.starts_with(&start) {
            return Err("it is not an outcome of pruning, or one of another version");
        }
        let body = checked(bytes)?;
        let (header, mut data): (Header, _) = read_header(body, start.len()).ok_or(ODD)?;
        if header.key != *key {
            return Err("it was made from something else");
        }
        let mut take = |len: Option<usize>| {
            let (these, rest) = data.split_at_checked(len?)?;
            data = rest;
            Some(these)
        };
        let mut projection = |stored: &StoredProjection| {
            Some(EncodedProjection {
                block_type: BlockType::from_id(stored.block_type)?,
                bytes: take(Some(stored.bytes))?.to_vec(),
                bias: match stored.bias {
                    None => None,
                    Some(n) => {
                        let mut numbers = Numbers(take(n.checked_mul(size_of::<f32>()))?);
                        let mut bias = vec![0.0; n];
                        numbers.floats(&mut bias);
                        Some(bias)
                    }
                },
            })
        };
        let layers = header.projections.iter();
        let layers = layers.map(|[o, down]| Some([projection(o)?, projection(down)?]));
        let layers: Vec<_> = layers.collect::<Option<_>>().ok_or(ODD)?;
        let types = match header.types {
            Some(stored) => {
                let list = |len: usize| {
                    let mut numbers = Numbers(take(len.checked_mul(size_of::<f32>()))?);
                    let mut list = vec![0.0; len];
                    numbers.floats(&mut list);
                    Some(list)
                };
                Some(stored.types(list).ok_or(ODD)?)
            }
            None => None,
        };
        let mut healed = |stored: StoredHealed| {
            let matrices = stored.matrices.into_iter();
            let matrices = matrices.map(|len| Some(take(Some(len))?.to_vec()));
            let matrices = matrices.collect::<Option<_>>()?;
            let mut numbers = Numbers(take(stored.vectors.checked_mul(size_of::<f32>()))?);
            let mut vectors = vec![0.0; stored.vectors];
            numbers.floats(&mut vectors);
            Some((stored.record, Rewritten::from_parts(matrices, vectors)))
        };
        let healed = match header.healed {
            Some(stored) => Some(healed(stored).ok_or(ODD)?),
            None => None,
        };
        let (behind, rest) = (body.len() - data.len(), data.len());
        let effects = header.effects.iter().map(StoredEffect::effect).collect();
        let effects: Option<Vec<Effect>> = effects;
        let single = header.single;
        let expected = single
            .as_ref()
            .map_or(Some(0), |(_, stored)| single::bytes(stored));
        if layers.len() != header.layers.len() || expected != Some(rest) {
            return Err(ODD);
        }
        let plans = header.layers.into_iter().map(StoredLayer::plan);
        let plans: Vec<_> = plans.collect::<Option<_>>().ok_or(ODD)?;
        let single = match single {
            Some((shares, stored)) => Some(Single::new(shares, &stored, file, behind).ok_or(ODD)?),
            None => None,
        };
        Ok(Self {
            ratio: header.ratio,
            found: header.found,
            plan: Plan {
                layers: plans,
                removed: header.removed,
                total: header.total,
            },
            layers,
            single,
            types,
            healed,
            effects: effects.ok_or(ODD)?,
        })
    }
}
