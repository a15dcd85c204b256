//! Structures: among which units scores are compared, and so where the budget goes (FLAP, section 3.3 and table 5). A new
//! structure is a variant of [`Structure`] and an arm of `Structure::pools`.

use super::names::named_choices;
use super::plan::Units;
use super::substitute::Choice;
use super::{Curves, HeadUnit, LayerScores, Plan, PruneError, RATIOS};
use crate::model::Model;

named_choices! {
    /// What one threshold spans. AL is all layers together, UL each for itself; AM is all modules (attention and MLP)
    /// together, MM each kind for itself, UM with the same ratio for both.
    "structure" Structure {
        /// The same ratio in every module of every layer.
        UlUm = "ul-um",
        /// The same ratio in every layer, shared out between its modules by scores.
        UlMm = "ul-mm",
        /// The same ratio for all attention and for all MLPs, each shared out among the layers by scores.
        AlMm = "al-mm",
        /// Everything by scores.
        AlAm = "al-am",
        /// Between modules by measured loss curves ([`curves`](super::curves)), within each by scores.
        Curves = "curves",
    }
}

impl Structure {
    /// The modules that share a threshold; module 2 l is the attention and 2 l + 1 the MLP of layer l.
    fn pools(self, layers: usize) -> Vec<Vec<usize>> {
        match self {
            Structure::UlUm => (0..2 * layers).map(|m| vec![m]).collect(),
            Structure::UlMm => (0..layers).map(|l| vec![2 * l, 2 * l + 1]).collect(),
            Structure::AlMm => (0..2)
                .map(|kind| (0..layers).map(|l| 2 * l + kind).collect())
                .collect(),
            Structure::AlAm | Structure::Curves => vec![(0..2 * layers).collect()],
        }
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
/// # Errors
/// If the ratio is out of [`RATIOS`], or curves are wanted and missing.
pub fn plan(
    model: &Model,
    scores: &[LayerScores],
    structure: Structure,
    heads: HeadUnit,
    curves: Option<&Curves>,
    ratio: f64,
) -> Result<Plan, PruneError> {
    plan_with(model, scores, structure, heads, curves, &[], ratio)
}

/// [`plan()`] with a choice of types for some modules. Widths are first taken in steps of the substitutes' blocks; where
/// the source type turns out to be better, the module is held to its blocks, and the budget is shared out again.
///
/// # Errors
/// Those of [`plan()`].
pub fn plan_with(
    model: &Model,
    scores: &[LayerScores],
    structure: Structure,
    heads: HeadUnit,
    curves: Option<&Curves>,
    choices: &[Option<Choice>],
    ratio: f64,
) -> Result<Plan, PruneError> {
    if !RATIOS.contains(&ratio) {
        return Err(PruneError::Ratio(ratio));
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
            curves.ok_or(PruneError::NoCurves)?.price(&mut modules);
            modules
        }
    };
    let free: Vec<(usize, &Choice)> = choices
        .iter()
        .enumerate()
        .filter_map(|(m, choice)| Some((m, choice.as_ref()?)))
        .collect();
    if !free.is_empty() {
        for (m, choice) in &free {
            modules[*m].allow(|columns| choice.can_keep(columns), None);
        }
        let gone = share_out(model, structure, &modules, ratio);
        for (m, choice) in &free {
            let width = [model.config.head_dim, 1][m % 2];
            let units = &mut modules[*m];
            let best = choice.best(units, units.rounded(gone[*m]), width);
            let may_stay =
                |columns| choice.is_whole(columns) || best.is_some_and(|t| choice.fits(t, columns));
            units.allow(may_stay, best);
        }
    }
    let gone = share_out(model, structure, &modules, ratio);
    Ok(Plan::new(model, &modules, &gone))
}

/// How many units of each module go.
fn share_out(model: &Model, structure: Structure, modules: &[Units], ratio: f64) -> Vec<usize> {
    let mut gone = vec![0; modules.len()];
    let mut left_over = 0.0;
    for pool in structure.pools(model.layers.len()) {
        let parameters: usize = pool.iter().map(|m| modules[*m].parameters()).sum();
        if let [module] = pool[..] {
            gone[module] = (ratio * modules[module].len() as f64) as usize;
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
fn take_lowest(modules: &[Units], pool: &[usize], target: f64, gone: &mut [usize]) -> usize {
    let mut order: Vec<(f64, usize)> = pool
        .iter()
        .flat_map(|m| modules[*m].scores.iter().map(move |score| (*score, *m)))
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
