//! Structures: among which units scores are compared, and so where the budget goes (FLAP, section 3.3 and table 5). A new
//! structure is a variant of [`Structure`] and an arm of `Structure::pools`.

use super::metric::LayerScores;
use super::plan::{Plan, RATIOS};
use super::substitute::Choice;
use super::units::{Units, plan_of};
use crate::model::{Model, Module, ModuleId};
use crate::prune::collect::Curves;
use crate::prune::error::{PruneError, PruneErrorKind};
use crate::prune::features::inputs_per_unit;
use crate::prune::recipe::{HeadUnit, Structure};

impl Structure {
    /// The modules that share a threshold.
    fn pools(self, layers: usize) -> Vec<Vec<ModuleId>> {
        let all = || ModuleId::each(ModuleId::all(layers));
        match self {
            Structure::UlUm => all().map(|module| vec![module]).collect(),
            Structure::UlMm => (0..layers)
                .map(|l| vec![ModuleId::attention(l), ModuleId::mlp(l)])
                .collect(),
            Structure::AlMm => [ModuleId::attention, ModuleId::mlp]
                .map(|kind| (0..layers).map(kind).collect())
                .into(),
            Structure::AlAm | Structure::Curves => vec![all().collect()],
        }
    }
}

/// What a budget is shared out by.
#[derive(Debug, Clone, Copy)]
pub struct Division<'a> {
    pub structure: Structure,
    pub heads: HeadUnit,
    /// What [`Structure::Curves`] goes by; `None` where nothing was measured.
    pub curves: Option<&'a Curves>,
    /// At the index of each module the types that its projection may change to, as [`choices`](super::substitute::choices) has
    /// them; empty where all are to keep theirs.
    pub choices: &'a [Option<Choice>],
}

/// How many units (heads or channels) of each module go: a plan before it is one, in which these numbers can be changed.
#[derive(Debug, Clone)]
pub struct Shares {
    modules: Vec<Units>,
    /// At the index of each module.
    gone: Vec<usize>,
}

impl Shares {
    /// All modules.
    pub fn modules(&self) -> impl Iterator<Item = ModuleId> + use<> {
        ModuleId::each(ModuleId::all(self.modules.len() / 2))
    }

    /// Parameters that are freed by all that goes.
    pub fn freed_in_all(&self) -> usize {
        self.modules().map(|m| self.freed(m, self.gone(m))).sum()
    }

    /// How many units of a module go; as many as blocks allow.
    pub fn gone(&self, module: ModuleId) -> usize {
        self.modules[module.index()].rounded(self.gone[module.index()])
    }

    /// Lets so many units of a module go.
    pub fn set(&mut self, module: ModuleId, gone: usize) {
        self.gone[module.index()] = gone;
    }

    /// Parameters that are freed if so many units of a module go.
    pub fn freed(&self, module: ModuleId, gone: usize) -> usize {
        self.modules[module.index()].freed(gone)
    }

    /// The heads or channels that stay if so many units of a module go, by ascending number.
    pub fn kept(&self, module: ModuleId, gone: usize) -> Vec<usize> {
        self.modules[module.index()].kept(gone)
    }

    /// The least number of units that frees at least so many parameters more than now; `None` if nothing would stay.
    pub fn more(&self, module: ModuleId, parameters: usize) -> Option<usize> {
        let (units, gone) = (&self.modules[module.index()], self.gone(module));
        let now = units.freed(gone);
        (gone + 1..units.len()).find(|n| {
            let rounded = units.rounded(*n);
            rounded < units.len() && units.freed(*n) >= now + parameters
        })
    }

    /// The largest number of units that frees at least so many parameters less than now, or all that is freed; `None` if nothing goes.
    pub fn fewer(&self, module: ModuleId, parameters: usize) -> Option<usize> {
        let (units, gone) = (&self.modules[module.index()], self.gone(module));
        let now = units.freed(gone);
        (0..gone)
            .rev()
            .find(|n| units.freed(*n) + parameters.min(now) <= now)
            .filter(|_| now > 0)
    }

    /// The plan that they make.
    ///
    /// # Panics
    /// If they are of another model.
    pub fn plan(&self, model: &Model) -> Plan {
        plan_of(model, &self.modules, &self.gone)
    }
}

/// Removes units in the order of their scores, lowest first, within each pool of the structure. Every unit weighs as many
/// parameters as it frees: a channel its row of gate and up and its column of down; a query head its rows of q and its
/// columns of o, and its KV head too if it was the last to read it. Widths are rounded to what the block formats need. Each
/// threshold is the one whose plan, after rounding, comes closest to the pool's share, and what a pool leaves over goes to
/// the next one. Only [`Structure::UlUm`] takes the share of every module's units for itself, rounded down as in the
/// authors' program: with few and large heads the plan then falls short of the ratio, and says so.
///
/// Where scores are compared across modules they are standardised first, within each layer and module: (x − mean) / std over
/// its features, those of attention squared before, as the authors' program does; a head's score is the mean over its
/// features.
///
/// Where types may change, widths are first taken in steps of the substitutes' blocks; where the source type turns out to be
/// better, the module is held to its blocks, and the budget is shared out again.
///
/// # Errors
/// If the ratio is out of [`RATIOS`], or curves are wanted and missing.
pub fn plan(
    model: &Model,
    scores: &[LayerScores],
    by: Division,
    ratio: f64,
) -> Result<Plan, PruneError> {
    Ok(shares(model, scores, by, ratio)?.plan(model))
}

/// The same before it is a plan.
///
/// # Errors
/// Those of [`plan()`].
pub fn shares(
    model: &Model,
    scores: &[LayerScores],
    by: Division,
    ratio: f64,
) -> Result<Shares, PruneError> {
    let Division {
        structure,
        heads,
        curves,
        choices,
    } = by;
    if !RATIOS.contains(&ratio) {
        return Err(PruneErrorKind::Ratio(ratio).into());
    }
    let mut modules = match structure {
        Structure::UlUm => Units::of_model(model, scores, heads),
        Structure::UlMm | Structure::AlMm | Structure::AlAm => {
            let standardised: Vec<LayerScores> = scores
                .iter()
                .map(|layer| LayerScores {
                    attention: standardise(layer.attention.iter().map(|s| s * s).collect()),
                    mlp: standardise(layer.mlp.clone()),
                })
                .collect();
            Units::of_model(model, &standardised, heads)
        }
        Structure::Curves => {
            let mut modules = Units::of_model(model, scores, heads);
            let curves = curves.filter(|c| c.modules.len() == modules.len());
            let curves = curves.ok_or(PruneErrorKind::NoCurves)?;
            price_by_curves(&mut modules, curves, ratio);
            modules
        }
    };
    let modules_by_id = ModuleId::each(ModuleId::all(model.layers.len()));
    let free: Vec<(ModuleId, &Choice)> = modules_by_id
        .zip(choices)
        .filter_map(|(module, choice)| Some((module, choice.as_ref()?)))
        .collect();
    if !free.is_empty() {
        for (module, choice) in &free {
            modules[module.index()].allow(|columns| choice.can_keep(columns), None);
        }
        let gone = share_out(model, structure, &modules, ratio);
        for (module, choice) in &free {
            let width = inputs_per_unit(model, module.kind());
            let units = &mut modules[module.index()];
            let best = choice.best(units, units.rounded(gone[module.index()]), width);
            let may_stay =
                |columns| choice.is_whole(columns) || best.is_some_and(|t| choice.fits(t, columns));
            units.allow(may_stay, best);
        }
    }
    let mut gone = share_out(model, structure, &modules, ratio);
    let standardised = (STANDARDISED.0 - STANDARDISED.1 * ratio).max(0.0);
    if structure == Structure::Curves && standardised > 0.0 {
        let by = Division {
            structure: Structure::AlAm,
            ..by
        };
        let other = shares(model, scores, by, ratio)?.gone;
        let pairs = gone.iter().zip(&other);
        let between = pairs.map(|(curves, other)| {
            (1.0 - standardised) * *curves as f64 + standardised * *other as f64
        });
        gone = in_proportion(&modules, &between.collect::<Vec<_>>(), ratio);
    }
    Ok(Shares { modules, gone })
}

/// The ratio at which everything goes that costs at most `price`, in nats per parameter, by the loss curves.
///
/// # Errors
/// If curves are missing.
pub(super) fn ratio_at(
    model: &Model,
    scores: &[LayerScores],
    by: Division,
    price: f64,
) -> Result<f64, PruneError> {
    let mut modules = Units::of_model(model, scores, by.heads);
    let curves = by.curves.filter(|c| c.modules.len() == modules.len());
    // Prices are looked for where little goes.
    price_by_curves(&mut modules, curves.ok_or(PruneErrorKind::NoCurves)?, 0.0);
    let cheap = |units: &Units| {
        let cheap = units.scores.iter().filter(|score| **score <= price);
        units.freed_exactly(cheap.count())
    };
    let freed: usize = modules.iter().map(cheap).sum();
    let all: usize = modules.iter().map(Units::parameters).sum();
    Ok(freed as f64 / all.max(1) as f64)
}

/// The ratio from which on only the ramps of loss curves count; see [`price_by_curves`].
const RAMPS_ALONE: f64 = 0.6;

/// How many times a head's price is that of its module's loss curve, at a ratio of 0. The factor falls in a straight line to 1 at the ratio [`RAMPS_ALONE`].
/// A loss curve is measured with all other modules whole, and plans are better if heads are spared more than that says
/// (`docs/pruning.md`).
const HEADS_COST: f64 = 3.0;

/// The share of the way from the plan of loss curves to the one of standardised scores, at a ratio of 0, and how much less of it with the
/// ratio. Curves are measured on a thousand tokens or a few, and do not see what other texts live on; statistics are
/// of many more (`docs/pruning.md`).
const STANDARDISED: (f64, f64) = (0.75, 2.5);

/// Numbers of units that go of each module, in proportion to these, so that as much is freed as the ratio says, or a little more.
fn in_proportion(modules: &[Units], numbers: &[f64], ratio: f64) -> Vec<usize> {
    let at = |factor: f64| -> Vec<usize> {
        let each = numbers.iter().zip(modules);
        each.map(|(number, units)| {
            let gone = (number * factor).round() as usize;
            // No module is emptied while there is another way.
            gone.min(units.len().saturating_sub(1))
        })
        .collect()
    };
    let all: usize = modules.iter().map(Units::parameters).sum();
    let enough = |gone: &[usize]| {
        let freed = gone.iter().zip(modules).map(|(n, units)| units.freed(*n));
        freed.sum::<usize>() as f64 >= ratio * all as f64
    };
    let (mut low, mut high) = (0.0, 2.0);
    for _ in 0..32 {
        let middle = (low + high) / 2.0;
        match enough(&at(middle)) {
            true => high = middle,
            false => low = middle,
        }
    }
    at(high)
}

/// Gives every unit as its score what it costs by its module's loss curve, per parameter. Taking the lowest of all then frees parameters at the
/// least rise of the loss, if rises add up.
///
/// A curve has few points, and between them there are two ways to go. By the scores of the units, a module that has many units which hardly do anything
/// loses them for next to nothing; that is what a little pruning finds. By the steepness of the curve, taken as a ramp that begins at nothing, what goes is spread over
/// the modules; losses of one module are measured with all others whole, and the more goes altogether, the more they come to beyond their sum. So
/// the price is a mean of both, with the ramp's weight in proportion to the ratio. For heads it is multiplied by a factor, [`HEADS_COST`] (`docs/pruning.md`).
fn price_by_curves(modules: &mut [Units], curves: &Curves, ratio: f64) {
    let ramps = (ratio / RAMPS_ALONE).min(1.0);
    let heads_cost = HEADS_COST + (1.0 - HEADS_COST) * ramps;
    let ids = ModuleId::each(ModuleId::all(modules.len() / 2));
    for ((units, curve), module) in modules.iter_mut().zip(&curves.modules).zip(ids) {
        let cost = match module.kind() {
            Module::Attention => heads_cost,
            Module::Mlp => 1.0,
        };
        let steepness = curve.steepness();
        let by_scores = prices_by_scores(units, &curve.points);
        let mut before = 0;
        // Units of equal steepness go in their order.
        let mut least = 0.0f64;
        for (place, by_score) in by_scores.into_iter().enumerate() {
            let after = units.freed_exactly(place + 1);
            let ramp = steepness.at((before + after) as f64 / 2.0);
            least = least.max(cost * ((1.0 - ramps) * by_score + ramps * ramp));
            units.scores[units.by_score[place]] = least;
            before = after;
        }
        // No module is emptied while there is another way.
        if let Some(last) = units.by_score.last() {
            units.scores[*last] = f64::INFINITY;
        }
    }
}

/// What each unit costs per parameter, in the order in which they go, if the loss rises in proportion to the scores of what is gone. The factor is the one
/// by which that comes closest to the points of the module's curve.
fn prices_by_scores(units: &Units, points: &[(usize, f64)]) -> Vec<f64> {
    let scores: Vec<f64> = units
        .by_score
        .iter()
        .map(|unit| units.scores[*unit].max(0.0))
        .collect();
    let gone_at = |freed: usize| {
        let mut places = 0..=units.len();
        places.find(|n| units.freed_exactly(*n) >= freed)
    };
    let (mut products, mut squares) = (0.0, 0.0);
    for (freed, loss) in points {
        let gone = gone_at(*freed).unwrap_or(units.len());
        let sum: f64 = scores[..gone].iter().sum();
        products += loss.max(0.0) * sum;
        squares += sum * sum;
    }
    let factor = match squares > 0.0 {
        true => products / squares,
        // Nothing was measured, so nothing is known to be harmless.
        false => f64::INFINITY,
    };
    let prices = scores.iter().enumerate().map(|(place, score)| {
        let freed = units.freed_exactly(place + 1) - units.freed_exactly(place);
        factor * score / freed.max(1) as f64
    });
    prices.collect()
}

/// How many units of each module go, at the index of each module.
fn share_out(model: &Model, structure: Structure, modules: &[Units], ratio: f64) -> Vec<usize> {
    let mut gone = vec![0; modules.len()];
    let mut left_over = 0.0;
    for pool in structure.pools(model.layers.len()) {
        let parameters: usize = pool.iter().map(|m| modules[m.index()].parameters()).sum();
        if let [module] = pool[..] {
            let m = module.index();
            gone[m] = (ratio * modules[m].len() as f64) as usize;
            continue;
        }
        let target = left_over + ratio * parameters as f64;
        let removed = take_lowest(modules, &pool, target, &mut gone);
        left_over = target - removed as f64;
    }
    gone
}

/// Walks the threshold of a pool up unit by unit, and sets `gone` to where the parameters freed came closest to `target`;
/// returns those.
fn take_lowest(modules: &[Units], pool: &[ModuleId], target: f64, gone: &mut [usize]) -> usize {
    let mut order: Vec<(f64, usize)> = pool
        .iter()
        .map(|module| module.index())
        .flat_map(|m| modules[m].scores.iter().map(move |score| (*score, m)))
        .collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    let distance = |removed: usize| (removed as f64 - target).abs();
    let mut walked = vec![0; modules.len()];
    let mut removed = 0;
    let mut best = (0, 0);
    for (step, (_, m)) in order.iter().enumerate() {
        removed -= modules[*m].freed(walked[*m]);
        walked[*m] += 1;
        removed += modules[*m].freed(walked[*m]);
        if distance(removed) < distance(best.1) {
            best = (step + 1, removed);
        }
    }
    for (_, m) in &order[..best.0] {
        gone[*m] += 1;
    }
    best.1
}

/// (x − mean) / std, with the sample standard deviation; all 0 where it is 0.
fn standardise(mut x: Vec<f64>) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0);
    let std = variance.sqrt();
    for v in &mut x {
        *v = if std > 0.0 { (*v - mean) / std } else { 0.0 };
    }
    x
}
