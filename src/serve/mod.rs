//! An HTTP server over the [engine](crate::engine): OpenAI's interface, what clients of Ollama need of theirs, and a page.
//!
//! A thread of its own, the worker, owns the models and takes step after step for all answers that are under way; handlers turn
//! requests into tokens, give the worker orders, and turn what comes back into JSON.
//!
//! | file | what it does |
//! | --- | --- |
//! | `worker` | the thread that owns the models: joins, steps, leaves, prunes between steps |
//! | `served` | what handlers know of a model |
//! | `answers` | what the worker sends back, in the parts that clients know |
//! | `sampling` | how tokens are chosen, from the fields of a request |
//! | `chat`, `completions`, `embeddings`, `models` | OpenAI's interface |
//! | `ollama` | Ollama's |
//! | `text` | text to tokens and back, templates |
//! | `pruning` | pruning the model that runs |
//! | `page` | the page |
//! | `guard`, `body`, `error`, `metrics` | keys and limits; bodies; errors as clients expect them; counts |

mod answers;
mod body;
mod chat;
mod completions;
mod embeddings;
mod error;
mod guard;
mod metrics;
mod models;
mod ollama;
mod page;
mod pruning;
mod sampling;
mod served;
mod text;
mod worker;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::Uri;
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use thiserror::Error;
use tokio::sync::watch;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::CorsLayer;

use crate::engine::{Engine, EngineError, PruneOptions};
use crate::generate::SamplerConfig;
use crate::model::CacheType;
use error::ApiError;
use metrics::Metrics;
use served::{Model, ModelState};
use worker::{Limits, Orders, Worker};

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Where to listen.
    pub address: SocketAddr,
    /// Answers side by side.
    pub parallel: usize,
    /// Requests that may wait for a place beyond these; more are refused.
    pub queue: usize,
    /// Tokens that prompt and answer may have together; `None` for as many as the model was trained for.
    pub context: Option<usize>,
    pub cache_type: CacheType,
    /// Blocks of the KV cache for all answers together; `None` for as many as it takes.
    pub cache_blocks: Option<usize>,
    /// Blocks of the KV cache that stay behind answers, for prompts that begin alike. They give way to answers.
    pub kept_blocks: usize,
    /// Bytes that the body of a request may have.
    pub body_bytes: usize,
    /// How long an answer may take; `None` for as long as it takes.
    pub timeout: Option<Duration>,
    /// What requests must have as their bearer token; `None` for nothing.
    pub api_key: Option<String>,
    /// Whether pages of other origins may use the server.
    pub cors: bool,
    /// Whether requests may prune the model; with what they leave open.
    pub pruning: Option<PruneOptions>,
    /// How long answers under way may still take when the server is stopped.
    pub grace: Duration,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 8080)),
            parallel: 4,
            queue: 64,
            context: None,
            cache_type: CacheType::default(),
            cache_blocks: None,
            kept_blocks: 256,
            body_bytes: 4 << 20,
            timeout: Some(Duration::from_secs(600)),
            api_key: None,
            cors: false,
            pruning: None,
            grace: Duration::from_secs(10),
        }
    }
}

/// Why a server does not start.
#[derive(Debug, Error)]
pub enum ServeError {
    #[error("cannot listen at {address}")]
    Listen {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("cannot start the server's threads")]
    Threads(#[source] std::io::Error),
    /// Anybody could send that.
    #[error("the API key is empty")]
    EmptyKey,
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// A model to be served.
#[derive(Debug)]
pub struct ServeModel {
    /// The name that clients call it by.
    pub name: String,
    pub engine: Engine,
    /// What stands before the messages of a conversation that has no system message; `None` for what the template puts there.
    pub system: Option<String>,
    /// How tokens are chosen where a request does not say.
    pub sampling: SamplerConfig,
}

/// What handlers share.
struct App {
    models: Vec<Model>,
    orders: Orders,
    options: ServeOptions,
    metrics: Arc<Metrics>,
    /// When the models were opened, in seconds since 1970.
    created: u64,
}

impl App {
    /// The model of this name, with its number. Clients name models of other servers by habit; these get the first.
    fn model(&self, name: Option<&str>) -> (usize, &Model) {
        let named = |model: &Model| Some(model.name.as_str()) == name;
        let number = self.models.iter().position(named).unwrap_or(0);
        (number, &self.models[number])
    }

    fn deadline(&self) -> Option<Instant> {
        self.options.timeout.map(|timeout| Instant::now() + timeout)
    }
}

/// A server that runs until it is stopped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens, and answers on threads of its own. The first model is the one that requests get which name none.
    ///
    /// # Errors
    /// If the address cannot be had, the key is empty, or a model cannot be served as the options say.
    ///
    /// # Panics
    /// If there is no model.
    pub fn start(models: Vec<ServeModel>, options: ServeOptions) -> Result<Self, ServeError> {
        assert!(!models.is_empty(), "a model to serve");
        if options
            .api_key
            .as_deref()
            .is_some_and(|key| key.trim().is_empty())
        {
            return Err(ServeError::EmptyKey);
        }
        let listen = |source| ServeError::Listen {
            address: options.address,
            source,
        };
        let listener = TcpListener::bind(options.address).map_err(listen)?;
        listener.set_nonblocking(true).map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;

        let metrics = Arc::new(Metrics::new());
        let limits = Limits {
            parallel: options.parallel,
            places: options.parallel + options.queue,
            cache_blocks: options.cache_blocks,
            kept_blocks: options.kept_blocks,
            cache_type: options.cache_type,
        };
        let (mut shown, mut engines) = (Vec::new(), Vec::new());
        for model in models {
            shown.push(Model::of(&model, &options)?);
            engines.push(model.engine);
        }
        let (worker, orders) = Worker::new(engines, limits, metrics.clone())?;
        let app = Arc::new(App {
            models: shown,
            orders,
            metrics,
            created: now(),
            options: options.clone(),
        });

        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ServeError::Threads)?;
        let (stop, stopped) = watch::channel(false);
        let grace = options.grace;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener).map_err(listen)?
        };
        let worker = thread("flapjack-worker", move || worker.run())?;
        let router = router(app);
        let http = thread("flapjack-http", move || {
            runtime.block_on(listen_until(listener, router, stopped, grace));
            // Tokenizing that nobody waits for any more must not hold up the end.
            runtime.shutdown_background();
        })?;
        Ok(Self {
            address,
            stop,
            threads: vec![http, worker],
        })
    }

    /// Where it listens, which tells the port where the options let the system choose one.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no more requests, lets answers that are under way end within the time of grace, and ends.
    pub fn stop(self) {
        self.stop.send_replace(true);
        for thread in self.threads {
            // A thread that panicked has said so, and has nothing left to do.
            let _ = thread.join();
        }
    }
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, ServeError> {
    let builder = std::thread::Builder::new().name(name.to_owned());
    builder.spawn(work).map_err(ServeError::Threads)
}

async fn listen_until(
    listener: tokio::net::TcpListener,
    router: Router,
    mut stopped: watch::Receiver<bool>,
    grace: Duration,
) {
    let mut late = stopped.clone();
    // Each token is told at once, and not held back until the client has acknowledged the one before.
    let listener = listener.tap_io(|connection| {
        if let Err(error) = connection.set_nodelay(true) {
            tracing::debug!("tokens may be held back: {error}");
        }
    });
    let serving = axum::serve(listener, router).with_graceful_shutdown(async move {
        let _ = stopped.wait_for(|stopped| *stopped).await;
    });
    let too_late = async move {
        let _ = late.wait_for(|stopped| *stopped).await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        served = serving => if let Err(error) = served {
            tracing::error!("the server ended: {error}");
        },
        () = too_late => tracing::warn!("answers under way were cut off"),
    }
}

fn router(app: Arc<App>) -> Router {
    let open = Router::new()
        .route("/health", get(models::health))
        .route("/", get(page::index))
        .route("/page/{file}", get(page::file));
    let guarded = Router::new()
        .route("/v1/chat/completions", post(chat::complete))
        .route("/chat/completions", post(chat::complete))
        .route("/v1/completions", post(completions::complete))
        .route("/completions", post(completions::complete))
        .route("/v1/embeddings", post(embeddings::embed))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{name}", get(models::show))
        .route("/tokenizer_info", get(models::tokenizer_info))
        .route("/tokenize", post(text::tokenize))
        .route("/detokenize", post(text::detokenize))
        .route("/apply-template", post(text::apply_template))
        .route("/prune", get(pruning::show).post(pruning::prune))
        .route("/api/chat", post(ollama::chat))
        .route("/api/generate", post(ollama::generate))
        .route("/api/tags", get(ollama::tags))
        .route("/api/ps", get(ollama::running))
        .route("/api/embed", post(ollama::embed))
        .route("/api/embeddings", post(ollama::embed_one))
        .route("/api/show", post(ollama::show))
        .route("/api/version", get(ollama::version))
        .route("/metrics", get(metrics::show))
        .layer(axum::middleware::from_fn_with_state(
            app.clone(),
            guard::check_key,
        ));
    let mut router = open
        .merge(guarded)
        .fallback(async |address: Uri| {
            ApiError::not_found("there is nothing at this address").at(address.path())
        })
        .method_not_allowed_fallback(async |address: Uri| {
            ApiError::wrong_method().at(address.path())
        })
        .layer(DefaultBodyLimit::max(app.options.body_bytes))
        .layer(axum::middleware::from_fn_with_state(
            app.clone(),
            guard::check_origin,
        ))
        .layer(CatchPanicLayer::custom(guard::panicked))
        .layer(axum::middleware::from_fn_with_state(
            app.clone(),
            guard::count,
        ));
    if app.options.cors {
        router = router.layer(CorsLayer::permissive());
    }
    router.with_state(app)
}

/// Seconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs())
}

/// The time of day in the form of RFC 3339.
fn timestamp() -> String {
    jiff::Timestamp::now().to_string()
}

/// A name that no other answer has.
fn unique(prefix: &str) -> String {
    format!("{prefix}{:032x}", rand::random::<u128>())
}
