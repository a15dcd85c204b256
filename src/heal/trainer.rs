//! Training from beginning to end.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::adamw::AdamW;
use super::backward::Gradients;
use super::batches::{BATCH, LENGTH, Sequences};
use super::checkpoint::{self, State};
use super::divergence::divergences;
use super::forward::InputMoments;
use super::gradients::Step;
use super::layout::Places;
use super::options::{Budget, Training, What};
use super::schedule::rate;
use super::student::Student;
use super::teacher::{LOGIT_ROWS, Predictor};
use crate::kernels::{Runtime, Team};
use crate::model::{Model, ModelError};
use crate::progress::{self, Cancelled, Progress};
use crate::prune::Rewritten;

/// Steps after which a time becomes a number of steps.
const TIMED: usize = 3;
/// Checkpoints are this far apart, and further where writing one takes long: it is to take at most a share of the time.
const BETWEEN: Duration = Duration::from_secs(30);
const LEAST_SHARE: u32 = 20;
/// Batches that tell what projections read.
const OBSERVED: usize = 8;

/// Why a model was not trained; it is as it was then.
#[derive(Debug, thiserror::Error)]
pub enum TrainingError {
    #[error("the text has {tokens} tokens, and training needs two sequences of {length} at least")]
    TooShort { tokens: usize, length: usize },
    #[error("the gradient of step {step} is not made of numbers; a lower learning rate may do")]
    NotNumbers { step: usize },
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

/// What training came to.
#[derive(Debug)]
pub struct Healed {
    /// The weights as they were trained, in the types of the model.
    pub weights: Rewritten,
    /// Tokens that were trained on, those that came several times counted as often.
    pub tokens: usize,
    pub steps: usize,
    /// What the steps took, also those of a run that was broken off before.
    pub time: Duration,
    /// Steps that a run that was broken off had done.
    pub resumed: usize,
}

/// A pruned model in training beside the dense one.
pub struct Trainer<'m> {
    pub teacher: &'m Model,
    pub model: &'m Model,
    pub runtime: &'m Runtime,
    pub training: Training,
    sequences: Sequences,
    /// Where checkpoints go, and what they are known by; `None` for none.
    pub checkpoints: Option<(PathBuf, String)>,
    /// How far checkpoints are apart at the least.
    pub between: Duration,
}

/// About as many bytes as training takes at its peak beside the two models, where `share` of the model's parameters stays.
pub fn bytes(model: &Model, what: What, share: f64) -> u64 {
    let places = Places::to_train(model, what);
    let (d, vocabulary) = (model.config.embedding_length, model.config.vocabulary);
    let weights = match what {
        What::All | What::LowRank => model.layers.iter().map(|l| l.bytes()).sum::<usize>(),
        What::Norms => 0,
    };
    let trained = places.total - places.first(what);
    let rows = BATCH * LENGTH.min(model.config.context_length);
    // Of what is trained gradients and two moments; and when these are gone, what projections read.
    let read = match what {
        What::All | What::LowRank if has_blocks(model) => InputMoments::bytes(model),
        _ => 0,
    };
    let training = read.max(12 * trained as u64);
    // Parameters; the weights before and after, as they are stored.
    let layers = 4 * places.total as u64 + training + 2 * weights as u64;
    let layers = ((layers + Step::bytes(model, rows)) as f64 * share) as u64;
    layers + 4 * (vocabulary * d) as u64 + 4 * (rows * 8 * d) as u64
}

/// How many values are trained.
pub fn trained(model: &Model, what: What) -> usize {
    let places = Places::to_train(model, what);
    places.total - places.first(what)
}

impl<'m> Trainer<'m> {
    /// Takes a text for training.
    ///
    /// # Errors
    /// [`TrainingError::TooShort`].
    pub fn new(
        (teacher, model): (&'m Model, &'m Model),
        runtime: &'m Runtime,
        training: Training,
        text: &[u32],
        bos: Option<u32>,
    ) -> Result<Self, TrainingError> {
        let context = model.config.context_length;
        let sequences = Sequences::new(text, bos, context, training.seed);
        let sequences = sequences.ok_or(TrainingError::TooShort {
            tokens: text.len(),
            length: LENGTH.min(context),
        })?;
        Ok(Self {
            teacher,
            model,
            runtime,
            training,
            sequences,
            checkpoints: None,
            between: BETWEEN,
        })
    }

    /// Tokens that are held back.
    pub fn held_back(&self) -> usize {
        self.sequences.held_back().len()
    }

    /// The mean of KL(teacher ‖ model) over the positions that are held back.
    ///
    /// # Errors
    /// Those of running a model.
    pub fn divergence(&self, model: &Model) -> Result<f64, TrainingError> {
        let (length, tokens) = (self.sequences.length, self.sequences.held_back());
        let vocabulary = model.config.vocabulary;
        let mut teacher = Predictor::new(self.teacher, BATCH, length)?;
        let mut student = Predictor::new(model, BATCH, length)?;
        let (mut targets, mut logits) = (Vec::new(), Vec::new());
        self.runtime.region(|team| {
            let mut sum = 0.0;
            for batch in tokens.chunks(BATCH * length) {
                teacher.read(team, batch, length)?;
                student.read(team, batch, length)?;
                for first in (0..batch.len()).step_by(LOGIT_ROWS) {
                    let rows = first..(first + LOGIT_ROWS).min(batch.len());
                    teacher.logits(team, rows.clone(), &mut targets);
                    student.logits(team, rows, &mut logits);
                    let each = divergences(team, &targets, &mut logits, vocabulary, None);
                    sum += each.iter().sum::<f64>();
                }
            }
            Ok(sum / tokens.len() as f64)
        })
    }

    /// Trains. `progress` counts tokens; their number is 0 while it is not known.
    ///
    /// # Errors
    /// If `progress` breaks, or the gradient is not made of numbers.
    pub fn run(&mut self, progress: &mut Progress) -> Result<Healed, TrainingError> {
        let (runtime, training, length) = (self.runtime, self.training, self.sequences.length);
        let each = self.sequences.batch_tokens();
        let mut student = Student::new(self.model, runtime, training.what);
        let trained = student.trained().len();
        let mut adamw = AdamW::new(trained);
        let mut state = self.resumed(&mut student, &mut adamw);
        let resumed = state.done;
        let mut gradients = vec![0.0; trained];
        let mut teacher = Predictor::new(self.teacher, BATCH, length)?;
        let mut step = Step::default();
        let (mut saved, mut saving) = (Instant::now(), Duration::ZERO);
        // The first step's seconds, which asks the system for memory and says little about the others; 0 in a run that was resumed.
        let mut first = 0.0;
        let tokens_of = |state: &State| (state.done * each, state.steps.unwrap_or(0) * each);
        let (done, all) = tokens_of(&state);
        progress::report(progress, done, all)?;
        while state.steps.is_none_or(|steps| state.done < steps) {
            let start = Instant::now();
            let tokens = self.sequences.batch(state.done);
            let rate = rate(training.rate, state.done, state.steps.unwrap_or(usize::MAX));
            let finite = runtime.region(|team: &Team| {
                teacher.read(team, &tokens, length)?;
                let logits = |rows, out: &mut Vec<f32>| teacher.logits(team, rows, out);
                let wanted = Gradients::From(student.first, &mut gradients);
                let loss = step.gradients(team, &student, &tokens, length, logits, wanted);
                tracing::debug!("step {}: divergence {loss:.4}, rate {rate:.2e}", state.done);
                let parameters = &mut student.parameters[student.first..];
                let finite = adamw.step(team, state.done, rate, &gradients, parameters);
                student.follow(team);
                Ok::<_, ModelError>(finite)
            })?;
            if !finite {
                return Err(TrainingError::NotNumbers { step: state.done });
            }
            state.done += 1;
            state.seconds += start.elapsed().as_secs_f64();
            if state.done == 1 {
                first = state.seconds;
            }
            if let (None, Budget::Time(time), TIMED) = (state.steps, training.budget, state.done) {
                let others = (state.seconds - first) / (TIMED - 1) as f64;
                let steps = 1.0 + (time.as_secs_f64() - first) / others;
                state.steps = Some((steps as usize).max(TIMED));
            }
            let (done, all) = tokens_of(&state);
            let broken = progress::report(progress, done, all);
            let last = state.steps == Some(state.done);
            let due = saved.elapsed() >= self.between.max(saving * LEAST_SHARE);
            if let Some((path, _)) = self
                .checkpoints
                .as_ref()
                .filter(|_| !last && (due || broken.is_err()))
            {
                let start = Instant::now();
                if let Err(error) = checkpoint::save(path, &state, student.trained(), &adamw) {
                    tracing::debug!("cannot write {}: {error}", path.display());
                }
                (saved, saving) = (Instant::now(), start.elapsed());
            }
            broken?;
        }
        drop((adamw, gradients, teacher));
        let moments = self.moments(&student, &mut step);
        Ok(Healed {
            weights: student.encode(runtime, &moments),
            tokens: state.done * each,
            steps: state.done,
            time: Duration::from_secs_f64(state.seconds),
            resumed,
        })
    }

    /// Where a run that was broken off was, or the beginning.
    fn resumed(&self, student: &mut Student, adamw: &mut AdamW) -> State {
        let each = self.sequences.batch_tokens();
        let trained = student.trained().len();
        let (path, key) = self.checkpoints.clone().unwrap_or_default();
        let beginning = State {
            key: key.clone(),
            done: 0,
            steps: match self.training.budget {
                Budget::Tokens(tokens) => Some(tokens.div_ceil(each).max(1)),
                Budget::Time(_) => None,
            },
            seconds: 0.0,
            trained,
        };
        if self.checkpoints.is_none() {
            return beginning;
        }
        let first = student.first;
        match checkpoint::load(&path, &key, &mut student.parameters[first..], adamw) {
            Ok(state) => {
                self.runtime.region(|team| student.follow(team));
                state.unwrap_or(beginning)
            }
            Err(()) => {
                tracing::warn!("{} is of no use; training anew", path.display());
                student.reset(self.runtime);
                *adamw = AdamW::new(trained);
                beginning
            }
        }
    }

    /// What projections read, where weights are to be rounded by it.
    fn moments(&mut self, student: &Student, step: &mut Step) -> InputMoments {
        let mut moments = InputMoments::default();
        if student.changes_matrices() && has_blocks(self.model) {
            for number in 0..OBSERVED {
                let (tokens, length) = (self.sequences.batch(number), self.sequences.length);
                self.runtime
                    .region(|team| step.observe(team, student, &tokens, length, &mut moments));
            }
        }
        moments
    }
}

/// Whether some projections are in types of blocks, which are rounded by what they read.
fn has_blocks(model: &Model) -> bool {
    let mut linears = model.layers.iter().flat_map(|layer| layer.linears());
    linears.any(|linear| !linear.weight.block_type.is_float())
}
