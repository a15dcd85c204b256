//! Options that several subcommands share.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use flapjack::gguf::GgufFile;
use flapjack::hub;
use flapjack::kernels::Runtime;
use flapjack::model::{CacheType, Model};
use flapjack::tokenize::Tokenizer;

use super::{memory, progress};

#[derive(Debug, Args)]
pub struct ModelOptions {
    /// A GGUF model [default: SmolLM2-135M-Instruct, fetched once and kept in the cache folder]
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Threads to compute with [default: one for each processor]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Leave the weights as they lie in the file, so that their pages stay shared with it and can be evicted: slower, for
    /// models near the size of the memory [default: rearrange them in place if the memory suffices]
    #[arg(long)]
    pub no_pack: bool,
}

#[derive(Debug, Clone, Copy, Default, Args)]
pub struct CacheOptions {
    /// Store the KV cache in this type; q8_0 takes about half the bytes
    #[arg(long = "kv", value_name = "TYPE", value_enum, default_value_t)]
    cache_type: CacheName,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum CacheName {
    #[default]
    F16,
    #[value(name = "q8_0")]
    Q8_0,
}

impl CacheOptions {
    pub fn cache_type(self) -> CacheType {
        match self.cache_type {
            CacheName::F16 => CacheType::F16,
            CacheName::Q8_0 => CacheType::Q8_0,
        }
    }
}

/// A model that is ready to run.
pub struct Loaded {
    pub model: Model,
    pub tokenizer: Tokenizer,
    pub runtime: Runtime,
    /// What mapping and checking took, without fetching the file.
    pub load_time: Duration,
    /// What packing the weights took, if they were packed.
    pub pack_time: Option<Duration>,
}

impl ModelOptions {
    pub fn load(&self) -> Result<Loaded> {
        let path = self.path()?;
        let runtime = self.runtime()?;
        let start = Instant::now();
        let file = GgufFile::open(&path)?;
        let tokenizer = Tokenizer::from_gguf(&file)?;
        let mut model = Model::load(file)?;
        if tokenizer.vocab_size() > model.config.vocabulary {
            bail!(
                "{}: the tokenizer has {} tokens and the embedding only {}; the file is damaged",
                path.display(),
                tokenizer.vocab_size(),
                model.config.vocabulary
            );
        }
        let load_time = start.elapsed();
        let pack_time = self.pack(&mut model, &runtime);
        Ok(Loaded {
            model,
            tokenizer,
            runtime,
            load_time,
            pack_time,
        })
    }

    /// Threads and kernels to compute with.
    pub fn runtime(&self) -> Result<Runtime> {
        let threads = match self.threads {
            Some(n) => usize::from(n),
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        Ok(Runtime::new(threads)?)
    }

    /// Packs the weights if that is wanted and possible, and tells how long it took.
    pub fn pack(&self, model: &mut Model, runtime: &Runtime) -> Option<Duration> {
        let start = Instant::now();
        self.should_pack(model, runtime).then(|| {
            model.pack(runtime);
            start.elapsed()
        })
    }

    fn path(&self) -> Result<PathBuf> {
        match &self.model {
            Some(path) => Ok(hub::local(path)?),
            None => progress::default_model(),
        }
    }

    /// The same model once more, from a map of its own, for what must not touch the first.
    pub fn load_again(&self, loaded: &Loaded) -> Result<Model> {
        let mut model = Model::load(GgufFile::open(loaded.model.path())?)?;
        self.pack(&mut model, &loaded.runtime);
        Ok(model)
    }

    /// Packed weights are private memory, which must fit beside what else is running.
    fn should_pack(&self, model: &Model, runtime: &Runtime) -> bool {
        if self.no_pack || !runtime.kernels.prefers_packed() {
            return false;
        }
        let needed = model.bytes() as u64 / 4 * 5;
        match memory::available() {
            Some(available) if available < needed => {
                tracing::warn!(
                    "weights stay as they lie in the file, which is slower: packing them takes {} MiB and {} MiB are free",
                    needed >> 20,
                    available >> 20
                );
                false
            }
            _ => true,
        }
    }
}

/// Refuses a file that could not be written later, before the work is done.
pub fn check_target(path: &Path) -> Result<()> {
    if path.is_dir() {
        bail!("{} is a folder; name a file to write to", path.display());
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // A link leads elsewhere; writing will tell.
    if !path.is_symlink() {
        tempfile::tempfile_in(folder)
            .with_context(|| format!("cannot write to the folder {}", folder.display()))?;
    }
    Ok(())
}

/// Reads a text file.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    String::from_utf8(bytes).map_err(|error| {
        anyhow::anyhow!(
            "{} is not UTF-8 text: the byte at offset {} is out of place",
            path.display(),
            error.utf8_error().valid_up_to()
        )
    })
}

/// Reads standard input to its end, unless it is a terminal.
pub fn read_standard_input() -> Result<String> {
    let mut input = std::io::stdin();
    if input.is_terminal() {
        bail!("there is no prompt; give one with -p TEXT, -f FILE or on standard input");
    }
    let mut text = String::new();
    input
        .read_to_string(&mut text)
        .context("cannot read the prompt from standard input")?;
    Ok(text)
}
