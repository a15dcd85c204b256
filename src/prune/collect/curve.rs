//! Loss curves as data: what removing a share of one module, and nothing else, costs. [`measure`](crate::prune::curves::measure)
//! makes them.

use std::hash::{Hash, Hasher};

use serde::{Deserialize, Serialize};

use crate::model::Module;
use crate::prune::exact;
use crate::prune::recipe::{HeadUnit, Metric, Restore};

/// What is measured of every module.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CurveOptions {
    /// What units are removed by, lowest first.
    pub metric: Metric,
    pub heads: HeadUnit,
    /// How their removal is made up for.
    pub restore: Restore,
    pub levels: CurveLevels,
}

/// Where on each curve a point is measured, and on how much text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CurveLevels {
    /// Tokens of the slice of text.
    pub tokens: usize,
    /// Tokens of its sequences.
    pub sequence: usize,
    /// How many layers further on the next one lies whose modules are measured, 1 for all of them. The last one is measured in any case, and
    /// what lies between two is interpolated.
    pub stride: usize,
    /// The shares of an MLP's channels that are removed, rising, above 0 and below 1.
    #[serde(with = "exact::list")]
    pub mlp_shares: Vec<f64>,
    /// The same of an attention module's heads.
    #[serde(with = "exact::list")]
    pub attention_shares: Vec<f64>,
}

impl CurveLevels {
    /// The shares of a module's units.
    pub fn shares(&self, module: Module) -> &[f64] {
        match module {
            Module::Attention => &self.attention_shares,
            Module::Mlp => &self.mlp_shares,
        }
    }
}

/// Shares are above 0 and below 1, and so equal to themselves.
impl Eq for CurveLevels {}

impl Hash for CurveLevels {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.tokens, self.sequence, self.stride).hash(state);
        for shares in [&self.mlp_shares, &self.attention_shares] {
            shares.len().hash(state);
            shares.iter().for_each(|s| s.to_bits().hash(state));
        }
    }
}

/// The loss curves of all modules.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Curves {
    pub metric: Metric,
    pub heads: HeadUnit,
    pub restore: Restore,
    /// At the [index](crate::model::ModuleId::index) of each module its curve.
    pub modules: Vec<Curve>,
    /// Tokens of the slice of text that they were measured on.
    pub tokens: usize,
}

/// How the loss rises as one module shrinks.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(from = "ExactPoints", into = "ExactPoints")]
pub struct Curve {
    /// Parameters freed and the mean Kullback-Leibler divergence from the dense model's predictions, in nats per token, by
    /// rising number of parameters; (0, 0) is left out.
    pub points: Vec<(usize, f64)>,
}

/// The points with the bits of the losses.
type ExactPoints = Vec<(usize, u64)>;

impl From<ExactPoints> for Curve {
    fn from(points: ExactPoints) -> Self {
        let points = points.into_iter();
        Self {
            points: points.map(|(n, bits)| (n, f64::from_bits(bits))).collect(),
        }
    }
}

impl From<Curve> for ExactPoints {
    fn from(curve: Curve) -> Self {
        let points = curve.points.into_iter();
        points.map(|(n, loss)| (n, loss.to_bits())).collect()
    }
}

impl Curve {
    /// The steepness of the convex, rising curve nearest to the points: slopes between points, made monotone by pooling
    /// adjacent violators (weighted by their lengths), and between the middles of segments interpolated.
    pub(in crate::prune) fn steepness(&self) -> Steepness {
        let mut segments: Vec<Segment> = Vec::new();
        let mut last = (0.0, 0.0);
        for &(freed, rise) in &self.points {
            let point = (freed as f64, rise);
            let length = point.0 - last.0;
            let mut new = Segment {
                start: last.0,
                length,
                slope: ((point.1 - last.1) / length).max(0.0),
            };
            while let Some(before) = segments.pop_if(|s| s.slope >= new.slope) {
                let length = before.length + new.length;
                new.slope = (before.slope * before.length + new.slope * new.length) / length;
                new.start = before.start;
                new.length = length;
            }
            segments.push(new);
            last = point;
        }
        let mut knots: Vec<(f64, f64)> = segments
            .iter()
            .map(|s| (s.start + s.length / 2.0, s.slope))
            .collect();
        // With one segment only the curve is taken as quadratic, as rises of the loss mostly are.
        if knots.len() == 1 {
            knots.insert(0, (0.0, 0.0));
        }
        Steepness { knots }
    }
}

struct Segment {
    start: f64,
    length: f64,
    slope: f64,
}

/// The slope of a curve, a piecewise linear, rising function of the parameters freed.
pub struct Steepness {
    /// Parameters freed and the slope there, two at least; fewer where nothing was measured.
    knots: Vec<(f64, f64)>,
}

impl Steepness {
    pub(in crate::prune) fn at(&self, x: f64) -> f64 {
        let [.., _] = &self.knots[..] else {
            return f64::INFINITY; // Nothing was measured, so nothing is known to be harmless.
        };
        let i = self.knots[1..self.knots.len() - 1].partition_point(|k| k.0 <= x);
        let ((x0, y0), (x1, y1)) = (self.knots[i], self.knots[i + 1]);
        (y0 + (y1 - y0) * (x - x0) / (x1 - x0)).max(0.0)
    }
}
