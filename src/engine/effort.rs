//! What fits into the time that an effort stands for: how long the calibration text is, on how much of it and how closely loss curves are
//! measured, whether least squares are solved, and on how much text the effect is measured.
//!
//! All of it follows from the model's shape and from what was asked for, and nothing from a measurement, so that every machine chooses the
//! same and finds what was kept. Seconds are those of two cores with AVX-512 and bfloat16 (Zen 4); `docs/speed.md` compares them with
//! measured ones.

use std::time::Duration;

use super::options::MethodOptions;
use super::report::Notice;
use super::text::TextSource;
use crate::heal::can_train;
use crate::model::Model;
use crate::prune::{CurveLevels, Effort, Method, Origin, Recipe, Restore, Structure, curves};

/// Multiply-adds per second of a prompt.
const READ: f64 = 2e11;
/// Those of texts that the model writes, 64 at a time.
const WRITTEN: f64 = 1.4e11;
/// Those of covariances.
const COVARIANCES: f64 = 1.4e11;
/// Weights times tokens per second of a plan that is tried: a pass forward and one back, in single precision.
const SEARCHED: f64 = 3.2e10;
/// Floating-point operations per second of least squares in double and in single precision.
const SOLVED: f64 = 7e10;
const SOLVED_SINGLE: f64 = 1.2e11;
/// Single precision is taken where a text has fewer tokens for each input than about this (`restore/restoration.rs`).
const SINGLE_TOKENS: f64 = 2.5;
/// Weights per second that are moved, and encoded anew, as matrices lose columns.
const APPLIED: f64 = 3e8;
/// The share of units that is taken to go, where the time of least squares depends on it.
const GONE: f64 = 0.3;
/// What may go into loss curves, into the search for a better plan, and into measuring the effect, of the time of an effort.
const FOR_CURVES: f64 = 0.4;
const FOR_SEARCH: f64 = 0.25;
const FOR_EFFECT: f64 = 0.1;

/// Tokens that are used of a text that is not the built-in one, at normal effort and at best. Least squares gain by more text
/// for long: with three times as much, 5 % of the perplexity (`docs/pruning.md`).
const TEXT_TOKENS: usize = 32_768;
const BEST_TEXT_TOKENS: usize = 98_304;
/// Tokens of the mixture, which the model must write first, at normal effort and at best.
const MIXTURE_TOKENS: usize = 24_576;
const BEST_MIXTURE_TOKENS: usize = 73_728;
/// Best effort restores in sequence if that leaves time for at least so many tokens.
const SEQUENCE_TOKENS: usize = BEST_TEXT_TOKENS / 2;
/// Plans that the search at best effort tries at the most.
const PLANS: usize = 6;
/// Tokens that are used of any text at fast effort.
const FAST_TOKENS: usize = 4096;
/// A text has a multiple of these, and at least as many, unless it is shorter.
const STEP: usize = 256;
/// Fewer tokens than this leave statistics to chance, so that loss curves get no time before.
const FEW_TOKENS: usize = 2048;
/// What takes less is not worth saying.
const NOTABLE_TIME: Duration = Duration::from_secs(5);
/// The tokens that effects are measured on, where there is time: the first that fits, or else the last.
const EFFECT_TOKENS: [usize; 4] = [1024, 512, 256, 128];

/// How much of each is done.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Amounts {
    /// Tokens of the calibration text at the most, those of loss curves included.
    pub tokens: usize,
    /// `None` where there is no time for loss curves, or nothing asks for them.
    pub curves: Option<CurveLevels>,
    /// Whether there is time for least squares, and text enough.
    pub least_squares: bool,
    /// Plans that the search for a better one tries, without a budget of its own; 0 where there is no time for it, or it is not made.
    pub plans: usize,
    /// Whether there is time for restoring in sequence.
    pub in_sequence: bool,
    /// Tokens that effects are measured on.
    pub effect: usize,
    /// What all of it takes.
    pub time: Duration,
    /// Whether the method does less than it would with more time.
    less: bool,
}

/// What was asked for that bears on the amounts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    pub method: &'a MethodOptions,
    pub source: &'a TextSource,
    /// Tokens of the text; `None` for as many as there is time for.
    pub tokens: Option<usize>,
    /// The share of the text that the model writes itself.
    pub written: f64,
}

/// The time that an effort stands for, on two cores with AVX-512.
pub(super) fn time_of(effort: Effort) -> Duration {
    Duration::from_secs(match effort {
        Effort::Fast => 10,
        Effort::Normal => 60,
        Effort::Best => 600,
    })
}

impl Amounts {
    /// As much of everything as fits into the time of the method's effort.
    pub fn that_fit(model: &Model, asked: Asked) -> Self {
        Self::of_costs(&Costs::of(model), asked)
    }

    fn of_costs(costs: &Costs, asked: Asked) -> Self {
        let method = asked.method;
        let effort = method.effort;
        let time = time_of(effort).as_secs_f64();
        let recipe = method.recipe();
        let effect = costs.tokens_of_effect(time);
        let fixed = costs.applied + costs.effect(effect);
        let most = most_tokens(asked.source, effort);
        let tokens_at = |seconds: f64, each: f64| match asked.tokens {
            Some(tokens) => tokens,
            None => {
                let fit = (seconds / each).max(0.0) as usize;
                (fit / STEP * STEP).clamp(STEP, most.max(STEP))
            }
        };
        let tokens_in = |seconds: f64, least_squares: bool| {
            tokens_at(seconds, costs.token(asked.written, least_squares))
        };
        let plans = |levels: &CurveLevels| match effort == Effort::Best && costs.can_search {
            true => costs.plans(levels, FOR_SEARCH * time),
            false => 0,
        };

        let can_solve = recipe.wants_covariance() && costs.widest > 0;
        let enough = |tokens: usize| can_solve && tokens >= costs.widest;
        let single = costs.solved / SOLVED_SINGLE;
        let tokens = tokens_in(time - fixed - single, true);
        let solving = match (tokens as f64) < SINGLE_TOKENS * costs.widest as f64 {
            true => single,
            false => costs.solved / SOLVED,
        };
        // With a text of a length that was asked for, each projection is restored as that is enough for.
        let least_squares = match (method.restore, asked.tokens) {
            (None, None) => enough(tokens),
            _ => can_solve,
        };
        let fixed = fixed + if least_squares { solving } else { 0.0 };

        let curves = match recipe.wants_curves() {
            false => None,
            true => {
                let fits = |levels: &CurveLevels| {
                    let seconds = costs.curves(levels, least_squares);
                    let searching = costs.search(levels, plans(levels));
                    let tokens = tokens_in(time - fixed - seconds - searching, least_squares);
                    let left = tokens.saturating_sub(levels.tokens);
                    let text_is_enough = match (asked.tokens, least_squares) {
                        (Some(_), _) => true,
                        (None, true) => enough(left),
                        (None, false) => left >= FEW_TOKENS.min(most / 2),
                    };
                    seconds <= FOR_CURVES * time && text_is_enough
                };
                let mut ladder = ladder(effort);
                let found = ladder.iter().position(fits);
                match (found, method.structure) {
                    (Some(found), _) => Some(ladder.swap_remove(found)),
                    // They were asked for by name.
                    (None, Some(_)) => ladder.pop(),
                    (None, None) => None,
                }
            }
        };
        let plans = curves.as_ref().map_or(0, plans);
        let fixed = fixed
            + curves.as_ref().map_or(0.0, |levels| {
                costs.curves(levels, least_squares) + costs.search(levels, plans)
            });
        let token = costs.token(asked.written, least_squares);
        let with_sequence = token + costs.in_sequence();
        let in_sequence = asked.tokens.is_some()
            || tokens_at(time - fixed, with_sequence) >= SEQUENCE_TOKENS.min(most);
        let token = match in_sequence && effort == Effort::Best && method.method == Method::Best {
            true => with_sequence,
            false => token,
        };
        let tokens = tokens_at(time - fixed, token);
        let seconds = fixed + tokens as f64 * token;
        // The built-in text is used whole where there is time, however long it is.
        let shorter = asked.tokens.is_none() && tokens < most && most < usize::MAX;
        let less = recipe.wants_curves() && curves.is_none() || can_solve && !least_squares;
        Self {
            tokens,
            curves,
            least_squares,
            plans,
            in_sequence,
            effect,
            time: Duration::from_secs_f64(seconds),
            less: less || shorter,
        }
    }

    /// What is said before it begins; `None` where it takes no time worth saying. `recipe` is the one that pruning follows, `origin` says of what
    /// text the profile is.
    pub fn notice(&self, effort: Effort, recipe: Recipe, origin: &Origin) -> Option<Notice> {
        let curves = origin.collected.curves.as_ref();
        (self.time >= NOTABLE_TIME).then(|| Notice::Effort {
            effort,
            time: self.time,
            tokens: origin.tokens,
            curves: curves.map(|options| (options.levels.tokens, options.levels.stride)),
            restore: recipe.restore,
            less: self.less,
        })
    }

    /// A method's recipe without what there is no time for, unless that was asked for by name.
    pub fn change(&self, recipe: Recipe, method: &MethodOptions) -> Recipe {
        let structure = match (recipe.structure, &self.curves) {
            (Structure::Curves, None) => Structure::AlAm,
            (structure, _) => structure,
        };
        let restore = match recipe.restore {
            Restore::Auto if !self.least_squares && method.restore.is_none() => Restore::Bias,
            Restore::Sequential if !self.in_sequence && method.restore.is_none() => Restore::Auto,
            restore => restore,
        };
        Recipe {
            structure,
            restore,
            ..recipe
        }
    }
}

/// Tokens that the effect of pruning a model is measured on, as the effort has time for it.
pub(super) fn tokens_of_effect(model: &Model, effort: Effort) -> usize {
    Costs::of(model).tokens_of_effect(time_of(effort).as_secs_f64())
}

/// Tokens that are used of a text at the most, however small the model is.
pub(super) fn most_tokens(source: &TextSource, effort: Effort) -> usize {
    match (source, effort) {
        (_, Effort::Fast) => FAST_TOKENS,
        (TextSource::BuiltIn, _) => usize::MAX,
        (TextSource::Mixture, Effort::Best) => BEST_MIXTURE_TOKENS,
        (TextSource::Mixture, Effort::Normal) => MIXTURE_TOKENS,
        (_, Effort::Best) => BEST_TEXT_TOKENS,
        _ => TEXT_TOKENS,
    }
}

/// The ways to measure loss curves, the closest first. Passing over layers costs less than measuring on less text does (`docs/pruning.md`).
fn ladder(effort: Effort) -> Vec<CurveLevels> {
    let closest = effort.curve_levels();
    let mut ladder = vec![closest.clone()];
    if effort == Effort::Best {
        for tokens in [2048, 1024] {
            ladder.push(CurveLevels {
                tokens,
                ..closest.clone()
            });
        }
        ladder.push(Effort::Normal.curve_levels());
    }
    for stride in [4, 8] {
        ladder.push(CurveLevels {
            stride,
            ..Effort::Normal.curve_levels()
        });
    }
    ladder
}

/// What a model costs, in seconds.
struct Costs {
    layers: f64,
    /// Weights of all layers, and of the output head.
    weights: f64,
    head: f64,
    /// Multiply-adds of the covariances of a token.
    covariances: f64,
    /// Inputs of the widest projection that loses columns.
    widest: usize,
    /// Operations of the least squares of all modules, as they are pruned; and of one layer for a point of each of its curves.
    solved: f64,
    solved_for_curves: f64,
    applied: f64,
    /// Whether plans can be searched for: whether the model can be trained.
    can_search: bool,
}

impl Costs {
    fn of(model: &Model) -> Self {
        let layers = model.layers.iter();
        let inputs = layers.map(|layer| [layer.o.weight.cols, layer.down.weight.cols]);
        let config = &model.config;
        let shape = Self::of_shape(
            &inputs.collect::<Vec<_>>(),
            config.embedding_length,
            model.layer_parameters(),
            config.vocabulary,
        );
        Self {
            can_search: can_train(model),
            ..shape
        }
    }

    /// Of the inputs of the two projections of each layer that lose columns, the width, the weights of all layers, and the vocabulary.
    fn of_shape(layers: &[[usize; 2]], width: usize, weights: usize, vocabulary: usize) -> Self {
        let d = width as f64;
        let inputs = || layers.iter().flatten().copied();
        // Cholesky's factors, both substitutions, and what goes times what it was multiplied with.
        let solve = |inputs: f64, gone: f64| {
            let (kept, removed) = (inputs * (1.0 - gone), inputs * gone);
            kept.powi(3) / 3.0 + 2.0 * kept * kept * d + 2.0 * kept * removed * d
        };
        let all = |gone: f64| inputs().map(|n| solve(n as f64, gone)).sum::<f64>();
        let (layers, weights) = (layers.len() as f64, weights as f64);
        Self {
            layers,
            weights,
            head: vocabulary as f64 * d,
            covariances: inputs().map(|n| (n * n) as f64 / 2.0).sum(),
            widest: inputs().max().unwrap_or(0),
            solved: all(GONE),
            solved_for_curves: all(0.5) / layers.max(1.0),
            applied: weights / APPLIED,
            can_search: true,
        }
    }

    /// A token of the text.
    fn token(&self, written: f64, covariances: bool) -> f64 {
        let covariances = if covariances { self.covariances } else { 0.0 };
        self.weights / READ
            + written * (self.weights + self.head) / WRITTEN
            + covariances / COVARIANCES
    }

    /// Loss curves: each point takes the layers behind its module, half of them on average, and the head at some of the positions.
    fn curves(&self, levels: &CurveLevels, least_squares: bool) -> f64 {
        let measured = (self.layers / levels.stride as f64).ceil() + f64::from(levels.stride > 1);
        let measured = measured.min(self.layers);
        let points = (levels.mlp_shares.len() + levels.attention_shares.len()) as f64;
        let tokens = levels.tokens as f64;
        let counted = tokens * curves::COUNTED.min(levels.sequence) as f64 / levels.sequence as f64;
        let passes = measured * points * (tokens * self.weights / 2.0 + counted * self.head) / READ;
        let solves = match least_squares {
            // One thread solves for a curve of few points.
            true => measured * points / 2.0 * self.solved_for_curves / (SOLVED / 2.0),
            false => 0.0,
        };
        passes + solves
    }

    /// Plans that can be tried in some seconds, beside the one to begin with, which is measured too.
    fn plans(&self, levels: &CurveLevels, seconds: f64) -> usize {
        let measured = (seconds / self.plan(levels)) as usize;
        measured.saturating_sub(1).min(PLANS)
    }

    /// A search that tries so many plans, on the text of loss curves; none for 0.
    fn search(&self, levels: &CurveLevels, plans: usize) -> f64 {
        let measured = if plans > 0 { plans + 1 } else { 0 };
        measured as f64 * self.plan(levels)
    }

    /// Measuring one plan, on that text.
    fn plan(&self, levels: &CurveLevels) -> f64 {
        levels.tokens as f64 * (self.weights + self.head) / SEARCHED
    }

    /// A token where it is restored in sequence, beyond restoring by least squares: between three and four passes, and covariances anew.
    fn in_sequence(&self) -> f64 {
        3.4 * self.weights / READ + self.covariances / COVARIANCES
    }

    /// Measuring the model on so many tokens before and after.
    fn effect(&self, tokens: usize) -> f64 {
        2.0 * tokens as f64 * (self.weights + self.head) / READ
    }

    fn tokens_of_effect(&self, time: f64) -> usize {
        let mut fit = EFFECT_TOKENS.into_iter();
        let fit = fit.find(|tokens| self.effect(*tokens) <= FOR_EFFECT * time);
        fit.unwrap_or(EFFECT_TOKENS[EFFECT_TOKENS.len() - 1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SmolLM2-135M, Qwen2.5-0.5B, Llama 3.2 1B and Llama 2 7B.
    fn sizes() -> [(&'static str, Costs); 4] {
        let costs = |layers, inputs, width, channels: usize, kv: usize, vocabulary| {
            let weights = layers * (2 * width * inputs + 2 * width * kv + 3 * width * channels);
            Costs::of_shape(
                &vec![[inputs, channels]; layers],
                width,
                weights,
                vocabulary,
            )
        };
        [
            ("135M", costs(30, 576, 576, 1536, 192, 49_152)),
            ("0.5B", costs(24, 896, 896, 4864, 128, 151_936)),
            ("1B", costs(16, 2048, 2048, 8192, 512, 128_256)),
            ("7B", costs(32, 4096, 4096, 11_008, 4096, 32_000)),
        ]
    }

    fn amounts(costs: &Costs, method: Method, effort: Effort, tokens: Option<usize>) -> Amounts {
        let method = MethodOptions {
            effort,
            ..method.into()
        };
        let written = if effort == Effort::Best { 0.8 } else { 0.45 };
        let source = &TextSource::Mixture;
        Amounts::of_costs(
            costs,
            Asked {
                method: &method,
                source,
                tokens,
                written,
            },
        )
    }

    #[test]
    fn an_effort_is_a_time_whatever_the_model() {
        for (name, costs) in &sizes() {
            for effort in [Effort::Fast, Effort::Normal, Effort::Best] {
                for method in [Method::Best, Method::Flap] {
                    let amounts = amounts(costs, method, effort, None);
                    // Ten seconds are not enough for a pass of the largest over the shortest text, and to move its weights.
                    let times = if (*name, effort) == ("7B", Effort::Fast) {
                        6
                    } else {
                        1
                    };
                    assert!(
                        amounts.time <= times * time_of(effort),
                        "{name} {method:?} {effort:?}: {amounts:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_small_model_gets_all_that_an_effort_is_for() {
        let [(_, small), ..] = sizes();
        let normal = amounts(&small, Method::Best, Effort::Normal, None);
        assert_eq!(normal.tokens, MIXTURE_TOKENS);
        assert_eq!(normal.curves, Some(Effort::Normal.curve_levels()));
        assert!(normal.least_squares && !normal.less);
        assert_eq!(normal.effect, 1024);
        let fast = amounts(&small, Method::Best, Effort::Fast, None);
        assert_eq!((fast.tokens, fast.curves), (FAST_TOKENS, None));
        assert_eq!((normal.plans, fast.plans), (0, 0));
    }

    #[test]
    fn the_search_for_a_plan_and_restoring_in_sequence_are_of_the_time_of_best_effort() {
        let [(_, small), .., (_, large)] = sizes();
        let best = amounts(&small, Method::Best, Effort::Best, None);
        assert_eq!(best.plans, PLANS);
        assert!(best.in_sequence && !best.less);
        assert_eq!(best.tokens, BEST_MIXTURE_TOKENS);
        // What cannot be searched takes less time.
        let fixed = Costs {
            can_search: false,
            ..small
        };
        let alone = amounts(&fixed, Method::Best, Effort::Best, None);
        assert_eq!((alone.plans, alone.tokens), (0, best.tokens));
        assert!(alone.time < best.time);
        // A single plan of the largest takes more than all of the time.
        let best = amounts(&large, Method::Best, Effort::Best, None);
        assert_eq!((best.plans, best.in_sequence), (0, false));
    }

    #[test]
    fn a_larger_model_gets_less_and_more_time_gives_more() {
        let mut before = usize::MAX;
        for (name, costs) in &sizes() {
            let normal = amounts(costs, Method::Best, Effort::Normal, None);
            let best = amounts(costs, Method::Best, Effort::Best, None);
            assert!(normal.tokens <= before, "{name}");
            assert!(normal.tokens < best.tokens, "{name}");
            before = normal.tokens;
            // Least squares are not begun on a text that has fewer tokens than inputs.
            for amounts in [normal, best] {
                let curves = amounts.curves.as_ref().map_or(0, |levels| levels.tokens);
                assert!(
                    !amounts.least_squares || amounts.tokens - curves >= costs.widest,
                    "{name}"
                );
            }
        }
    }

    #[test]
    fn what_was_asked_for_by_name_is_done() {
        let [.., (_, large)] = sizes();
        let asked = amounts(&large, Method::Best, Effort::Normal, Some(20_000));
        assert_eq!(asked.tokens, 20_000);
        let method = MethodOptions {
            structure: Some(Structure::Curves),
            restore: Some(Restore::Lsq),
            ..MethodOptions::default()
        };
        let source = &TextSource::Mixture;
        let amounts = Amounts::of_costs(
            &large,
            Asked {
                method: &method,
                source,
                tokens: None,
                written: 0.45,
            },
        );
        assert!(amounts.curves.is_some());
        let recipe = amounts.change(method.recipe(), &method);
        assert_eq!(
            (recipe.structure, recipe.restore),
            (Structure::Curves, Restore::Lsq)
        );
    }
}
