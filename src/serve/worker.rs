//! The thread that owns the models: it takes orders, and between any two steps of answers new ones join and others leave.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use super::error::ApiError;
use super::metrics::Metrics;
use crate::engine::{Engine, EngineError, Event, PruneOptions, PruneReport};
use crate::generate::{Generated, Request, RequestId, Scheduler, Timings, TokenLogprob};
use crate::model::CacheType;
use std::ops::ControlFlow;

/// What a handler asks of the worker.
pub(super) enum Order {
    Answer(Box<Job>),
    Embed {
        model: usize,
        tokens: Vec<u32>,
        reply: oneshot::Sender<Result<Vec<f32>, EngineError>>,
    },
    Prune(Box<PruneOrder>),
}

/// An answer to be made.
pub(super) struct Job {
    model: usize,
    /// Which of a request's answers it is.
    choice: usize,
    request: Request,
    /// Tokens that prompt and answer together may have.
    context: usize,
    replies: UnboundedSender<Reply>,
    /// When the answer is given up; `None` for never.
    deadline: Option<Instant>,
    pace: Pace,
    /// Its place among those that are under way or waiting.
    _place: Place,
}

/// How fast an answer comes, by the time that its own model works: where two models answer, they take turns, and by the clock on
/// the wall each would be as fast as the other.
#[derive(Debug, Clone, Copy, Default)]
struct Pace {
    /// Whether the prompt is read.
    begun: bool,
    steps: usize,
    time: Duration,
}

/// What becomes of a [`Job`].
#[derive(Debug)]
pub(super) enum Reply {
    /// What the tokens of the prompt are worth, from the second on, where that was asked for.
    Prompt {
        choice: usize,
        scored: Vec<TokenLogprob>,
    },
    /// Text that has become complete, with what its tokens were worth where that was asked for.
    Piece {
        choice: usize,
        text: String,
        scored: Vec<TokenLogprob>,
        timings: Timings,
    },
    Ended {
        choice: usize,
        generated: Generated,
    },
    Failed {
        error: ApiError,
    },
}

/// A model to be pruned between two steps.
pub(super) struct PruneOrder {
    pub model: usize,
    /// `None` for the model as its file has it.
    pub options: Option<PruneOptions>,
    pub events: Box<dyn FnMut(Event) -> ControlFlow<()> + Send>,
    /// Looks at the model as it is afterwards.
    pub done: Box<dyn FnOnce(&Engine) + Send>,
    pub reply: oneshot::Sender<Result<Option<PruneReport>, EngineError>>,
}

/// A place among the requests that are under way or waiting, which is free again when it is dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The worker, for handlers.
#[derive(Clone)]
pub(super) struct Orders {
    sender: Sender<Order>,
    places: Arc<AtomicUsize>,
    most_places: usize,
}

/// What several answers to one prompt have in common.
pub(super) struct Asked {
    pub model: usize,
    pub context: usize,
    pub deadline: Option<Instant>,
}

impl Orders {
    /// Has requests answered, side by side; their replies come as one stream. Dropping it gives them up.
    ///
    /// # Errors
    /// If too many are waiting already, or the server is stopping.
    pub fn answer(
        &self,
        asked: &Asked,
        requests: Vec<Request>,
    ) -> Result<UnboundedReceiver<Reply>, ApiError> {
        let (replies, stream) = unbounded_channel();
        let places = self.places(requests.len())?;
        for ((choice, request), place) in requests.into_iter().enumerate().zip(places) {
            self.send(Order::Answer(Box::new(Job {
                model: asked.model,
                choice,
                request,
                context: asked.context,
                replies: replies.clone(),
                deadline: asked.deadline,
                pace: Pace::default(),
                _place: place,
            })))?;
        }
        Ok(stream)
    }

    /// Places for so many answers, or for none.
    fn places(&self, count: usize) -> Result<Vec<Place>, ApiError> {
        let more = |taken: usize| {
            let taken = taken.checked_add(count)?;
            (taken <= self.most_places).then_some(taken)
        };
        self.places
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .map_err(ApiError::busy)?;
        Ok((0..count).map(|_| Place(self.places.clone())).collect())
    }

    pub fn send(&self, order: Order) -> Result<(), ApiError> {
        self.sender.send(order).map_err(|_| ApiError::stopping())
    }

    /// The mean of the model's outputs over tokens.
    pub async fn embed(&self, model: usize, tokens: Vec<u32>) -> Result<Vec<f32>, ApiError> {
        let _place = self.places(1)?;
        let (reply, answer) = oneshot::channel();
        self.send(Order::Embed {
            model,
            tokens,
            reply,
        })?;
        let answer = answer.await.map_err(|_| ApiError::stopping())?;
        answer.map_err(|error| ApiError::internal(error.to_string()))
    }
}

/// A model that is served, and its answers.
struct Served {
    engine: Engine,
    scheduler: Scheduler,
    /// Answers that the scheduler has.
    running: HashMap<RequestId, Job>,
    /// Answers that have no place in the scheduler yet, in the order in which they came.
    waiting: VecDeque<Job>,
}

/// What limits the worker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Answers side by side.
    pub parallel: usize,
    /// Those and what may wait.
    pub places: usize,
    /// Blocks of the KV cache; `None` for as many as it takes.
    pub cache_blocks: Option<usize>,
    /// Blocks that stay behind answers, for prompts that begin alike.
    pub kept_blocks: usize,
    pub cache_type: CacheType,
}

impl Limits {
    fn scheduler(&self, engine: &Engine) -> Result<Scheduler, EngineError> {
        let mut scheduler = engine.scheduler(self.cache_type, self.cache_blocks)?;
        scheduler.keep_prompts(self.kept_blocks);
        Ok(scheduler)
    }
}

pub(super) struct Worker {
    served: Vec<Served>,
    inbox: Receiver<Order>,
    limits: Limits,
    metrics: Arc<Metrics>,
}

impl Worker {
    /// A worker for these models, and the way to give it orders.
    ///
    /// # Errors
    /// If a model's keys and values cannot be stored as the limits have it, or one has no tokenizer.
    pub fn new(
        engines: Vec<Engine>,
        limits: Limits,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, Orders), EngineError> {
        let serve = |engine: Engine| {
            Ok(Served {
                scheduler: limits.scheduler(&engine)?,
                engine,
                running: HashMap::new(),
                waiting: VecDeque::new(),
            })
        };
        let (sender, inbox) = mpsc::channel();
        let orders = Orders {
            sender,
            places: Arc::new(AtomicUsize::new(0)),
            most_places: limits.places,
        };
        let served = engines
            .into_iter()
            .map(serve)
            .collect::<Result<_, EngineError>>()?;
        let worker = Self {
            served,
            inbox,
            limits,
            metrics,
        };
        Ok((worker, orders))
    }

    /// Works until nobody is there any more who could give orders.
    pub fn run(mut self) {
        loop {
            if self.served.iter().all(Served::is_idle) {
                self.tell_metrics();
                match self.inbox.recv() {
                    Ok(order) => self.take(order),
                    Err(_) => return,
                }
            }
            loop {
                match self.inbox.try_recv() {
                    Ok(order) => self.take(order),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            for served in &mut self.served {
                served.let_go();
                served.begin(self.limits.parallel);
                served.step(&self.metrics);
            }
            self.tell_metrics();
        }
    }

    fn take(&mut self, order: Order) {
        match order {
            Order::Answer(job) => self.served[job.model].waiting.push_back(*job),
            Order::Embed {
                model,
                tokens,
                reply,
            } => {
                // Whoever asked may have left meanwhile.
                let _ = reply.send(self.served[model].engine.embedding(&tokens));
            }
            Order::Prune(order) => {
                let PruneOrder {
                    model,
                    options,
                    mut events,
                    done,
                    reply,
                } = *order;
                let served = &mut self.served[model];
                let pruned = served.prune(options.as_ref(), &mut *events, self.limits);
                done(&served.engine);
                let _ = reply.send(pruned);
            }
        }
    }

    fn tell_metrics(&self) {
        let count = |of: fn(&Served) -> usize| self.served.iter().map(of).sum::<usize>() as i64;
        self.metrics.running.set(count(|s| s.running.len()));
        self.metrics.waiting.set(count(|s| s.waiting.len()));
        self.metrics
            .cache_blocks
            .set(count(|s| s.scheduler.used_blocks()));
    }
}

impl Served {
    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Gives up answers that nobody waits for any more, or that have taken too long.
    fn let_go(&mut self) {
        let now = Instant::now();
        let goes = |job: &Job| {
            let late = job.deadline.is_some_and(|deadline| now >= deadline);
            if late {
                job.fail(ApiError::too_slow());
            }
            late || job.replies.is_closed()
        };
        self.waiting.retain(|job| !goes(job));
        let scheduler = &mut self.scheduler;
        self.running.retain(|id, job| {
            let goes = goes(job);
            if goes {
                scheduler.cancel(*id);
            }
            !goes
        });
    }

    /// Gives answers that wait to the scheduler, as far as there is room.
    fn begin(&mut self, parallel: usize) {
        while self.running.len() < parallel {
            let Some(job) = self.waiting.pop_front() else {
                break;
            };
            let with = self.engine.loaded();
            match with
                .and_then(|with| Ok(self.scheduler.add(with, job.request.clone(), job.context)?))
            {
                Ok(id) => {
                    self.running.insert(id, job);
                }
                Err(error) => job.fail(ApiError::of(&error)),
            }
        }
    }

    /// Takes a step, and passes on what it brought.
    fn step(&mut self, metrics: &Metrics) {
        if self.running.is_empty() {
            return;
        }
        let start = Instant::now();
        let stepped = self
            .engine
            .loaded()
            .and_then(|with| Ok(self.scheduler.step(with)?));
        let updates = match stepped {
            Ok(updates) => updates,
            Err(error) => {
                // It concerns all of them, and would come again.
                let error = ApiError::internal(error.to_string());
                for (id, job) in self.running.drain() {
                    self.scheduler.cancel(id);
                    job.fail(error.clone());
                }
                return;
            }
        };
        let time = start.elapsed();
        metrics.steps.observe(time.as_secs_f64());
        for job in self.running.values_mut().filter(|job| job.pace.begun) {
            job.pace.time += time;
        }
        for update in updates {
            let Some(job) = self.running.get_mut(&update.id) else {
                continue;
            };
            match job.pace.begun {
                true => job.pace.steps += 1,
                false => job.pace.begun = true,
            }
            if !update.prompt_logprobs.is_empty() {
                job.reply(Reply::Prompt {
                    choice: job.choice,
                    scored: update.prompt_logprobs,
                });
            }
            if !update.text.is_empty() || update.logprob.is_some() {
                job.reply(Reply::Piece {
                    choice: job.choice,
                    text: update.text,
                    scored: update.logprob.into_iter().collect(),
                    timings: job.pace.timings(),
                });
            }
            match update.ended {
                None => continue,
                Some(Ok(mut generated)) => {
                    let Timings {
                        steps, generation, ..
                    } = job.pace.timings();
                    generated.timings = Timings {
                        steps,
                        generation,
                        ..generated.timings
                    };
                    metrics
                        .prompt_tokens
                        .inc_by(generated.timings.prompt_tokens as u64);
                    metrics
                        .generated_tokens
                        .inc_by(generated.tokens.len() as u64);
                    job.reply(Reply::Ended {
                        choice: job.choice,
                        generated,
                    });
                }
                Some(Err(error)) => job.fail(ApiError::of(&error.into())),
            }
            self.running.remove(&update.id);
        }
    }

    /// Prunes the model anew, or takes it as its file has it. Answers under way stand still, and go on with the new model.
    fn prune(
        &mut self,
        options: Option<&PruneOptions>,
        events: &mut (dyn FnMut(Event) -> ControlFlow<()> + Send),
        limits: Limits,
    ) -> Result<Option<PruneReport>, EngineError> {
        let Self {
            engine, scheduler, ..
        } = self;
        if engine.is_touched() {
            engine.reopen()?;
        }
        let pruned = options
            .map(|options| engine.prune(options, events))
            .transpose();
        if pruned.is_err() && engine.is_touched() {
            // It may have broken off in the middle.
            engine.reopen()?;
        }
        scheduler.pause(engine.pool(limits.cache_type, limits.cache_blocks)?);
        pruned
    }
}

impl Pace {
    /// With nothing of the prompt.
    fn timings(&self) -> Timings {
        Timings {
            steps: self.steps,
            generation: self.time,
            ..Timings::default()
        }
    }
}

impl Job {
    /// Tells whoever waits. If nobody does, the job goes before the next step.
    fn reply(&self, reply: Reply) {
        let _ = self.replies.send(reply);
    }

    fn fail(&self, error: ApiError) {
        self.reply(Reply::Failed { error });
    }
}
