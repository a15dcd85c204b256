//! `flapjack serve`

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use flapjack::engine::{Engine, PruneOptions};
use flapjack::serve::{ServeModel, ServeOptions, Server};

use super::arguments::{CacheArgs, Given, ModelArgs, PruningArgs, WrongUse, parse_size, whole};
use super::chat::ChatArgs;
use super::interrupt::Watch;
use super::sampling::SamplingArgs;
use super::{heading, interrupt, progress, words};

#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    given: Given,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    chat: ChatArgs,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    pruning: PruningArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = heading::SERVER)]
struct ServerArgs {
    /// Listen at this address
    ///
    /// 0.0.0.0 lets other machines in, for which there should be an --api-key.
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Listen at this port (0: one that the system chooses)
    #[arg(long, value_name = "N", default_value_t = 8080)]
    port: u16,
    /// Answers side by side
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = whole::<u16>(1..=256))]
    parallel: u16,
    /// Requests that may wait for a place; more are refused with 429
    #[arg(long, value_name = "N", default_value_t = 64)]
    queue: u16,
    /// Tokens of prompt and answer together
    ///
    /// By default as many as the model was trained for.
    #[arg(short, long, visible_alias = "ctx-size", value_name = "N")]
    ctx: Option<usize>,
    /// Give up answers that take longer (0: never)
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Refuse larger requests
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "4MiB")]
    max_body: u64,
    /// Want this key as bearer token
    #[arg(
        long,
        value_name = "KEY",
        value_parser = parse_key,
        env = "FLAPJACK_API_KEY",
        hide_env_values = true
    )]
    api_key: Option<String>,
    /// Let pages of other origins use the server
    #[arg(long)]
    cors: bool,
    /// The name of the model for clients [default: that of its file]
    #[arg(long, value_name = "NAME")]
    alias: Option<String>,
    /// Let requests prune the model while it runs (POST /prune)
    #[arg(long)]
    allow_prune: bool,
    /// Serve the dense model beside the pruned one, for comparison
    #[arg(long)]
    compare: bool,
}

/// A key that somebody must know. An empty one is what a variable that is not set leaves behind.
fn parse_key(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => {
            Err("it is empty, and would let in everybody; leave it out if no key is wanted".into())
        }
        _ => Ok(text.to_owned()),
    }
}

pub fn run(args: ServeArgs) -> Result<()> {
    let mut engine = args.model.open()?;
    let pruning = args.pruning.options_if_any(true)?;
    if let Some(options) = &pruning {
        let prepared = engine.prepare(options)?;
        words::log(prepared.notices());
        let report = engine.prune_prepared(prepared, &mut progress::bars())?;
        words::log(&report.notices);
        interrupt::check()?;
        words::say(&format!("pruned: {}", words::gone(&report)));
    }
    let comparable = pruning.is_some() || args.server.allow_prune;
    if args.given.has("compare") && !comparable {
        bail!(WrongUse::new(
            "there is nothing to compare; prune the model, or let requests do it with --allow-prune"
        ));
    }
    let name = match &args.server.alias {
        Some(name) => name.clone(),
        None => args.model.title(&engine),
    };
    let mut models = Vec::new();
    if args.server.compare && comparable {
        let dense = args.model.open()?;
        models.push(args.serve(format!("{name}:dense"), dense)?);
    }
    // What requests get that name no model.
    models.insert(0, args.serve(name, engine)?);
    let options = args.options(pruning);
    let has_key = options.api_key.is_some();
    let server = Server::start(models, options)?;
    let address = server.address();
    words::say(&format!(
        "serving at http://{address}; a page to chat is there, OpenAI's interface at http://{address}/v1"
    ));
    if !address.ip().is_loopback() && !has_key {
        tracing::warn!("other machines can use this server, and need no key; --api-key sets one");
    }
    let watch = Watch::begin();
    while watch.flow().is_continue() {
        std::thread::sleep(Duration::from_millis(50));
    }
    words::say("stopping");
    server.stop();
    Ok(watch.end()?)
}

impl ServeArgs {
    fn serve(&self, name: String, mut engine: Engine) -> Result<ServeModel> {
        self.chat.prepare(&mut engine)?;
        Ok(ServeModel {
            name,
            sampling: self.sampling.config(&engine)?,
            system: self.chat.system(&self.model),
            engine,
        })
    }

    fn options(&self, pruning: Option<PruneOptions>) -> ServeOptions {
        let server = &self.server;
        ServeOptions {
            address: SocketAddr::new(server.host, server.port),
            parallel: server.parallel.into(),
            queue: server.queue.into(),
            context: server.ctx,
            cache_type: self.cache.cache_type(),
            body_bytes: usize::try_from(server.max_body).unwrap_or(usize::MAX),
            timeout: Some(server.timeout)
                .filter(|n| *n > 0)
                .map(Duration::from_secs),
            api_key: server.api_key.clone(),
            cors: server.cors,
            pruning: server.allow_prune.then(|| pruning.unwrap_or_default()),
            ..ServeOptions::default()
        }
    }
}
