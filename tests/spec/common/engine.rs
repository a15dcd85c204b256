//! An engine on a small random model, in a folder of its own.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Output;

use flapjack::engine::{
    CalibrationOptions, Engine, EngineError, Event, MethodOptions, OpenOptions, PruneOptions,
    PruneReport, Stage, SyntheticType, TINY, TextSource, ignore, write_synthetic,
};
use flapjack::prune::Method;
use tempfile::TempDir;

use super::program::{program, run_with_input};

/// The name that the program gives the folder for profiles and outcomes.
pub const CACHE: &str = "profiles";

/// A model whose tokens are bytes, a cache folder, and room for files.
pub struct Workshop {
    pub model: PathBuf,
    folder: TempDir,
}

impl Workshop {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let model = folder.path().join("tiny.gguf");
        write_synthetic(&model, TINY, SyntheticType::Q8_0).expect("the model is written");
        Self { model, folder }
    }

    /// Where a file of the folder is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file of the folder and returns its path.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("the folder is made");
        fs::write(&path, content).expect("the file is written");
        path
    }

    pub fn open(&self) -> Engine {
        self.open_file(&self.model)
    }

    pub fn open_file(&self, path: &Path) -> Engine {
        let options = OpenOptions {
            threads: Some(1),
            cache: Some(self.path(CACHE)),
            ..OpenOptions::default()
        };
        Engine::open(path, options).expect("the model is well formed")
    }

    /// Opens the model and prunes it.
    pub fn try_prune(&self, options: &PruneOptions) -> Result<PruneReport, EngineError> {
        self.open().prune(options, &mut ignore)
    }

    pub fn prune(&self, options: &PruneOptions) -> PruneReport {
        self.try_prune(options).expect("the model is pruned")
    }

    /// The program on the model, with the cache of this folder.
    pub fn flapjack(&self, arguments: &[&str]) -> Output {
        self.flapjack_reading(arguments, b"")
    }

    /// The same with something on its standard input.
    pub fn flapjack_reading(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut command = program();
        command.args(arguments).arg("-m").arg(&self.model);
        // Profiles are in a folder inside the one for model files.
        command.env("FLAPJACK_CACHE", self.folder.path());
        run_with_input(command, input)
    }

    /// The profiles or outcomes in the cache, by what their names end with.
    pub fn cached(&self, extension: &str) -> Vec<PathBuf> {
        let files = fs::read_dir(self.path(CACHE)).into_iter().flatten();
        let mut files: Vec<_> = files
            .map(|file| file.expect("a file").path())
            .filter(|path| path.extension().is_some_and(|e| e == extension))
            .collect();
        files.sort();
        files
    }
}

/// Pruning after little calibration: by FLAP, which needs neither covariances nor loss curves.
pub fn flap() -> PruneOptions {
    by(Method::Flap)
}

/// Pruning by a method after little calibration.
pub fn by(method: impl Into<MethodOptions>) -> PruneOptions {
    PruneOptions {
        method: method.into(),
        calibration: tokens(512),
        ..PruneOptions::default()
    }
}

/// So many tokens of the built-in text.
pub fn tokens(tokens: usize) -> CalibrationOptions {
    CalibrationOptions {
        tokens: Some(tokens),
        ..source(TextSource::BuiltIn)
    }
}

/// All of a source that is used by default.
pub fn source(source: TextSource) -> CalibrationOptions {
    CalibrationOptions {
        source,
        ..CalibrationOptions::default()
    }
}

/// Cancels at the first event of a stage at which so much is done.
pub fn break_at(stage: Stage, done: u64) -> impl FnMut(Event) -> ControlFlow<()> + Send {
    move |event| match event.stage == stage && event.done >= done {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}
