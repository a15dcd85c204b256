//! Search over whole plans: what each module should keep, with all others pruned as the plan has it.
//!
//! Losses of single modules do not add up (Týr-the-Pruner, arXiv 2503.09657; EvoPress, arXiv 2410.14649), so that loss curves, which are
//! measured with everything else dense, only give the plan to begin with. From there on, round by round, the divergence of the pruned
//! model from the dense one is measured on a text, with its derivative by every weight of the projections that lose columns. The
//! derivative tells, to the first order, what it costs if a module loses a step more, and what it brings if it keeps a step more; budget moves
//! from the modules where it is worth most to those where it is worth least, several at a time. A plan is kept if its divergence is smaller on the same tokens, so that
//! chance cancels; if not, fewer steps are tried.

use std::ops::Range;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::backward::Gradients;
use super::batches::{BATCH, LENGTH, cut};
use super::forward::fit;
use super::gradients::Step;
use super::layout::{DOWN, O, Places};
use super::options::What;
use super::student::Student;
use super::teacher::Predictor;
use super::trainer::TrainingError;
use crate::kernels::{Factor, Runtime, Store, multiply};
use crate::model::{Model, ModelError, Module, ModuleId};
use crate::progress::{self, Progress};
use crate::prune::{
    Plan, Profile, PruneError, Restoration, Restore, Shares, inputs_per_unit, restore_module,
};

/// The share of an MLP's weights that a step adds or removes, rounded up to whole blocks. A step of attention is one head.
const STEP: f64 = 1.0 / 24.0;
/// The share of all modules that may change in the first round.
const FIRST: f64 = 0.5;

/// What the curvature of single positions is multiplied by, since a change at one position also acts on those behind it.
const CURVATURE: f64 = 1.5;
/// Of the tokens that are drawn from predictions for the curvature: the same in every round, so that rounds can be compared.
const SEED: u64 = 0;

/// About as many bytes as a search takes at its peak beside the model.
pub fn search_bytes(model: &Model) -> u64 {
    let places = Places::with_biases(model);
    let layers = model.layers.iter();
    let outputs: usize = layers
        .map(|l| l.o.weight.parameters() + l.down.weight.parameters())
        .sum();
    let (d, vocabulary) = (model.config.embedding_length, model.config.vocabulary);
    let rows = BATCH * LENGTH.min(model.config.context_length);
    // The parameters and the head; derivatives, and two steps each now and in the next round; what a batch takes.
    4 * (places.total + vocabulary * d + 5 * outputs) as u64 + Step::bytes(model, rows)
}

/// What a search has come to.
#[derive(Debug)]
pub struct Searched {
    pub plan: Plan,
    /// The divergence of the plan that it began with and of the one that it ended with, in nats a token.
    pub before: f64,
    pub after: f64,
    /// Tokens that it was measured on.
    pub tokens: usize,
    /// Plans that were tried, and those of them that were better.
    pub tried: usize,
    pub better: usize,
}

/// A search for a better plan.
pub struct Search<'m> {
    pub model: &'m Model,
    pub runtime: &'m Runtime,
    /// With the covariances of all layers, where restoration wants them.
    pub profile: &'m Profile,
    /// How a module that loses something is made up for.
    pub restore: Restore,
    /// The plan to begin with.
    pub shares: Shares,
    /// Tokens that it is measured on, which statistics have not seen; whole sequences of 256 of them are used.
    pub text: &'m [u32],
    /// The token that stands in front of every sequence; `None` where the model wants none.
    pub bos: Option<u32>,
    /// Plans that are tried at most.
    pub plans: usize,
    /// No plan is tried that would take longer; `None` for any time.
    pub budget: Option<Duration>,
}

/// A plan with its model, and what was measured of it.
struct State<'m> {
    shares: Shares,
    student: Student<'m>,
    divergence: f64,
}

/// A change of one module: a step more of it goes, or a step comes back.
struct Move {
    module: ModuleId,
    /// How many of the module's units are gone behind it.
    gone: usize,
    /// Parameters that it frees; negative where some come back.
    freed: f64,
    /// What its last projection becomes, less what it is, `[out, in]`, and the same of the bias.
    weights: Vec<f32>,
    bias: Vec<f32>,
    /// What it costs, in nats a token.
    cost: f64,
}

impl Move {
    /// What it costs, or brings, in nats a token for each parameter.
    fn price(&self) -> f64 {
        self.cost / self.freed
    }

    /// Changes the model, and gives back what was in those places.
    fn carry_out(&self, state: &mut State) -> Vec<(Range<usize>, Vec<f32>)> {
        state.shares.set(self.module, self.gone);
        let places = output(&state.student.places, self.module);
        let changes = places.into_iter().zip([&self.weights, &self.bias]);
        let change = |(at, change): (Range<usize>, &Vec<f32>)| {
            let values = &mut state.student.parameters[at.clone()];
            let before = values.to_vec();
            values.iter_mut().zip(change).for_each(|(v, c)| *v += c);
            (at, before)
        };
        changes.map(change).collect()
    }
}

impl<'m> Search<'m> {
    /// Searches until the budget is spent or nothing gets better, or `progress`, which counts plans, breaks. The best plan so far is the result.
    ///
    /// # Errors
    /// If the text is too short, or weights are not numbers.
    pub fn run(self, progress: &mut Progress) -> Result<Searched, SearchError> {
        let start = Instant::now();
        let places = Places::with_biases(self.model);
        let outputs = ModuleId::each(ModuleId::all(self.model.layers.len()));
        let outputs = outputs.flat_map(|m| output(&places, m)).collect();
        let (text, length) = cut(self.text, self.bos, self.model.config.context_length);
        if text.is_empty() {
            return Err(TrainingError::TooShort {
                tokens: self.text.len(),
                length,
            }
            .into());
        }
        let mut measure = Measure {
            search: &self,
            text,
            length,
            outputs,
            teacher: Predictor::new(self.model, BATCH, length)?,
            step: Step::default(),
        };
        let mut state = State {
            shares: self.shares.clone(),
            student: Student::in_places(self.model, self.runtime, What::All, places),
            divergence: 0.0,
        };
        let target = state.shares.freed_in_all();
        // From the dense model to the plan.
        for change in self.changes(&state, |shares, module| vec![shares.gone(module)])? {
            change.carry_out(&mut state);
        }
        let mut moves = self.steps(&state)?;
        measure.of(&mut state, &mut moves)?;
        let before = state.divergence;
        let (mut tried, mut better) = (0, 0);
        let mut most = FIRST * state.shares.modules().count() as f64;
        let mut round = start.elapsed();
        let in_time = |round| self.budget.is_none_or(|b| start.elapsed() + round < b);
        let all = match self.budget {
            Some(_) => 0,
            None => self.plans,
        };
        while most >= 2.0 && tried < self.plans && in_time(round) {
            let begun = Instant::now();
            if progress::report(progress, tried, all).is_err() {
                break;
            }
            let chosen = choose(&moves, &state.shares, target, most as usize);
            if chosen.is_empty() {
                break;
            }
            let (divergence, shares) = (state.divergence, state.shares.clone());
            let expected: f64 = chosen.iter().map(|i| moves[*i].cost).sum();
            let undo: Vec<_> = chosen
                .iter()
                .map(|i| moves[*i].carry_out(&mut state))
                .collect();
            let mut following = self.steps(&state)?;
            measure.of(&mut state, &mut following)?;
            tried += 1;
            tracing::debug!(
                "plan {tried}: {} changes, divergence {divergence:.4} to {:.4}, expected {:.4}",
                chosen.len(),
                state.divergence,
                divergence + expected
            );
            if state.divergence < divergence {
                better += 1;
                most *= 1.25;
                moves = following;
            } else {
                (state.divergence, state.shares) = (divergence, shares);
                for (at, values) in undo.into_iter().flatten() {
                    state.student.parameters[at].copy_from_slice(&values);
                }
                most = chosen.len() as f64 / 2.0;
            }
            round = round.max(begun.elapsed());
        }
        let tokens = measure.text.len();
        Ok(Searched {
            plan: state.shares.plan(self.model),
            before,
            after: state.divergence,
            tokens,
            tried,
            better,
        })
    }

    /// One step more and one step less of every module.
    fn steps(&self, state: &State) -> Result<Vec<Move>, PruneError> {
        self.changes(state, |shares, module| {
            let parameters = match module.kind() {
                Module::Attention => 1,
                Module::Mlp => {
                    let down = &self.model.layers[module.layer()].down.weight;
                    (3.0 * STEP * down.parameters() as f64) as usize
                }
            };
            let steps = [
                shares.more(module, parameters),
                shares.fewer(module, parameters),
            ];
            steps.into_iter().flatten().collect()
        })
    }

    /// The changes that take each module from where it is to the numbers of units gone that `numbers` names for it. Their costs are not measured yet.
    fn changes(
        &self,
        state: &State,
        numbers: impl Fn(&Shares, ModuleId) -> Vec<usize>,
    ) -> Result<Vec<Move>, PruneError> {
        let shares = &state.shares;
        let asked: Vec<(ModuleId, usize)> = shares
            .modules()
            .flat_map(|module| {
                let numbers = numbers(shares, module);
                numbers.into_iter().map(move |gone| (module, gone))
            })
            .collect();
        let moves = self.runtime.region(|team| {
            team.map(asked.len(), |i| {
                let (module, gone) = asked[i];
                let kept = shares.kept(module, gone);
                let stats = &self.profile.layers[module.layer()];
                let restored = restore_module(self.model, stats, module, &kept, self.restore)?;
                let (mut weights, mut bias) = dense(self.model, module, &kept, &restored);
                for (new, at) in [&mut weights, &mut bias]
                    .into_iter()
                    .zip(output(&state.student.places, module))
                {
                    let now = state.student.at(&at);
                    new.iter_mut().zip(now).for_each(|(new, now)| *new -= now);
                }
                let freed = |gone| shares.freed(module, gone) as f64;
                Ok(Move {
                    module,
                    gone,
                    freed: freed(gone) - freed(shares.gone(module)),
                    weights,
                    bias,
                    cost: 0.0,
                })
            })
        });
        moves.into_iter().collect()
    }
}

/// The numbers of at most so many moves, each of another module, after which as much is freed as is wanted: what is cheapest goes, what is dearest
/// comes back, as long as that promises a gain.
fn choose(moves: &[Move], shares: &Shares, target: usize, most: usize) -> Vec<usize> {
    let changes = (0..moves.len()).filter(|i| moves[*i].freed != 0.0);
    let (mut more, mut fewer): (Vec<usize>, Vec<usize>) =
        changes.partition(|i| moves[*i].freed > 0.0);
    more.sort_by(|a, b| moves[*b].price().total_cmp(&moves[*a].price()));
    fewer.sort_by(|a, b| moves[*a].price().total_cmp(&moves[*b].price()));
    let mut balance = shares.freed_in_all() as f64 - target as f64;
    let mut chosen: Vec<usize> = Vec::new();
    // How many of those chosen leave the plan nearest to what is to be freed, and how far from it.
    let mut whole = (0, balance.abs());
    while chosen.len() < most {
        let next = |list: &mut Vec<usize>| {
            let taken = |i: usize| chosen.iter().any(|c| moves[*c].module == moves[i].module);
            while list.last().is_some_and(|i| taken(*i)) {
                list.pop();
            }
            list.last().copied()
        };
        let (Some(up), Some(down)) = (next(&mut more), next(&mut fewer)) else {
            break;
        };
        if moves[up].price() >= moves[down].price() {
            break;
        }
        let next = if balance > 0.0 { down } else { up };
        balance += moves[next].freed;
        chosen.push(next);
        if balance.abs() <= whole.1.max(0.5 * moves[next].freed.abs()) {
            whole = (chosen.len(), balance.abs());
        }
    }
    chosen.truncate(whole.0);
    chosen
}

/// What measuring a plan takes.
struct Measure<'s, 'm> {
    search: &'s Search<'m>,
    /// Sequences of `length` tokens.
    text: Vec<u32>,
    length: usize,
    /// Where the projections that lose columns lie, each with its bias, in the order of modules.
    outputs: Vec<Range<usize>>,
    teacher: Predictor<'m>,
    step: Step,
}

impl Measure<'_, '_> {
    /// Measures the divergence, and what moves cost: to the first order by its derivative, to the second by the curvature of each position by itself.
    fn of(&mut self, state: &mut State, moves: &mut [Move]) -> Result<(), SearchError> {
        let Self {
            search,
            text,
            length,
            outputs,
            teacher,
            step,
        } = self;
        let starts: Vec<usize> = outputs
            .iter()
            .scan(0, |end, place| {
                *end += place.len();
                Some(*end - place.len())
            })
            .collect();
        let mut derivatives = vec![0.0f32; outputs.iter().map(Range::len).sum()];
        let mut sum = 0.0;
        let d = search.model.config.embedding_length;
        let mut random = ChaCha8Rng::seed_from_u64(SEED);
        let mut squares = vec![0.0f64; moves.len()];
        let mut change = Vec::new();
        for tokens in text.chunks(BATCH * *length) {
            let share = tokens.len() as f64 / text.len() as f64;
            let student = &state.student;
            let chance: Vec<f32> = tokens.iter().map(|_| random.random()).collect();
            let loss = search.runtime.region(|team| {
                teacher.read(team, tokens, *length)?;
                let logits = |rows, out: &mut Vec<f32>| teacher.logits(team, rows, out);
                let wanted = Gradients::Of(outputs, &mut derivatives);
                let loss = step.gradients(team, student, tokens, *length, logits, wanted);
                for m in moves.iter_mut() {
                    for (i, new) in [&m.weights, &m.bias].into_iter().enumerate() {
                        let start = starts[2 * m.module.index() + i];
                        let terms = new.iter().zip(&derivatives[start..]);
                        let cost: f64 = terms.map(|(new, g)| f64::from(new * g)).sum();
                        m.cost += share * cost;
                    }
                }
                step.curvatures(team, student, &chance, &mut |team, module, x, dy| {
                    for (m, square) in moves.iter().zip(&mut squares) {
                        if m.module != module {
                            continue;
                        }
                        let cols = m.weights.len() / d;
                        let change = fit(&mut change, dy.len());
                        multiply(
                            team,
                            Factor::new(x, tokens.len(), cols),
                            Factor::new(&m.weights, d, cols).t(),
                            Store::Replace,
                            change,
                        );
                        let rows = change.chunks_exact(d).zip(dy.chunks_exact(d));
                        for (change, dy) in rows {
                            let terms = change.iter().zip(&m.bias).zip(dy);
                            let a: f32 = terms.map(|((c, b), g)| (c + b) * g).sum();
                            *square += f64::from(a * a);
                        }
                    }
                });
                Ok::<f64, ModelError>(loss)
            })?;
            sum += loss * share;
        }
        for (m, square) in moves.iter_mut().zip(squares) {
            m.cost += 0.5 * CURVATURE * square / text.len() as f64;
        }
        state.divergence = sum;
        Ok(())
    }
}

/// The number of a module's projection that loses columns.
fn projection(module: ModuleId) -> usize {
    match module.kind() {
        Module::Attention => O,
        Module::Mlp => DOWN,
    }
}

/// Where a module's projection that loses columns lies, and its bias.
fn output(places: &Places, module: ModuleId) -> [Range<usize>; 2] {
    let (layer, which) = (&places.layers[module.layer()], projection(module));
    let bias = layer.biases[which].clone().expect("all have one");
    [layer.weights[which].clone(), bias]
}

/// The weights of a module's projection that loses columns, with zeros in those that go, and its bias.
fn dense(
    model: &Model,
    module: ModuleId,
    kept: &[usize],
    restored: &Restoration,
) -> (Vec<f32>, Vec<f32>) {
    let linear = model.layers[module.layer()].linears()[projection(module)];
    let weight = &linear.weight;
    let width = inputs_per_unit(model, module.kind());
    let mut weights = weight.decode(&model.map);
    for (i, row) in weights.chunks_exact_mut(weight.cols.max(1)).enumerate() {
        let mut next = 0;
        for (unit, values) in row.chunks_exact_mut(width).enumerate() {
            if kept.get(next) != Some(&unit) {
                values.fill(0.0);
                continue;
            }
            if let Some(new) = &restored.weights {
                let at = (i * kept.len() + next) * width;
                values.copy_from_slice(&new[at..at + width]);
            }
            next += 1;
        }
    }
    let mut bias = restored.bias.clone();
    bias.resize(weight.rows, 0.0);
    if let Some(own) = &linear.bias {
        bias.iter_mut().zip(own).for_each(|(b, own)| *b += own);
    }
    (weights, bias)
}

/// Why a search did not begin, or was broken off; the model is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    #[error(transparent)]
    Measuring(#[from] TrainingError),
    #[error(transparent)]
    Pruning(#[from] PruneError),
}

impl From<ModelError> for SearchError {
    fn from(error: ModelError) -> Self {
        SearchError::Measuring(error.into())
    }
}
