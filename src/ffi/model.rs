//! Opening a model, looking at it, pruning it, writing it to a file.

use std::ffi::{CString, c_char, c_int, c_void};
use std::ops::ControlFlow;
use std::ptr;
use std::str::FromStr;
use std::sync::Arc;

use serde::Serialize;

use super::shared::Shared;
use super::status::{Failure, FlapjackStatus, call};
use super::values::{
    Options, Plain, fill, fill_options, given_text, is_null, options, path, place, text,
};
use crate::engine::{
    Engine, EngineError, Event, ModelReport, Notice, OpenOptions, Pack, PruneOptions, PruneReport,
    SequenceOptions, SparseOptions, TextSource,
};
use crate::hub::DEFAULT_SYSTEM;
use crate::prune::Target;
use crate::prune::sparse::Sparsity;

/// A model that is open. One call at a time uses it, on whichever thread; another one then returns FLAPJACK_STATUS_BUSY.
pub struct FlapjackModel {
    shared: Arc<Shared>,
}

/// What a handle has.
///
/// # Safety
/// It is NULL, or a model that was not freed.
pub(super) unsafe fn shared(model: *const FlapjackModel) -> Result<Arc<Shared>, Failure> {
    // SAFETY: as the caller promises. The handle may be freed by a callback; what is shared stays until the call ends.
    let model = unsafe { model.as_ref() };
    Ok(model.ok_or_else(|| is_null("the model"))?.shared.clone())
}

// ---- progress ----

/// How far something long is: the name of its stage ("calibrating", "pruning" and others), and units that are done and in all, 0
/// where nobody knows beforehand. Anything but 0 calls it off. It may be called on another thread than the caller's, but never
/// by two at once.
pub type FlapjackProgress = Option<
    unsafe extern "C" fn(stage: *const c_char, done: u64, total: u64, data: *mut c_void) -> c_int,
>;

/// A function of C's for progress, with its data.
struct Progress {
    function: FlapjackProgress,
    data: *mut c_void,
}

// SAFETY: the data are not looked at here, and the header says on which threads they are handed back.
unsafe impl Send for Progress {}

impl Progress {
    fn tell(&self, event: Event) -> ControlFlow<()> {
        let Some(function) = self.function else {
            return ControlFlow::Continue(());
        };
        let stage = serde_json::to_value(event.stage).unwrap_or_default();
        let stage = CString::new(stage.as_str().unwrap_or_default()).unwrap_or_default();
        // SAFETY: as the module's documentation says of callbacks.
        match unsafe { function(stage.as_ptr(), event.done, event.total, self.data) } {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }

    /// Events of a call on a model, which [`flapjack_cancel`] can end too.
    fn events(self, shared: &Shared) -> impl FnMut(Event) -> ControlFlow<()> + Send {
        move |event| {
            self.tell(event)?;
            shared.go_on()
        }
    }
}

// ---- opening ----

/// How to open a model. flapjack_open_options_default() fills it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct FlapjackOpenOptions {
    /// The size of this struct; filled by the function.
    pub size: usize,
    /// Threads to compute with; 0 for one for each processor.
    pub threads: u32,
    /// Anything but 0 rearranges the weights in memory, which is faster; 0 leaves their pages shared with the file.
    pub pack: i32,
    /// Tokens that a text, or a conversation, may have; 0 for as many as the model was trained for.
    pub context: u64,
    /// The folder in which results of calibration and pruning are kept; NULL for the user's.
    pub cache_folder: *const c_char,
}

// SAFETY: numbers and pointers, the first a `usize`.
unsafe impl Plain for FlapjackOpenOptions {}
// SAFETY: as above.
unsafe impl Options for FlapjackOpenOptions {
    const FILLED_BY: &str = "flapjack_open_options_default";
}

impl FlapjackOpenOptions {
    fn new(size: usize) -> Self {
        Self {
            size,
            threads: 0,
            pack: 1,
            context: 0,
            cache_folder: ptr::null(),
        }
    }
}

/// Fills options for flapjack_open() with defaults. `size` is their size, as the caller knows it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_open_options_default(
    options: *mut FlapjackOpenOptions,
    size: usize,
) {
    // SAFETY: as the module's documentation says of structs.
    unsafe { fill_options(options, size, &FlapjackOpenOptions::new(size)) };
}

/// Opens a model file (GGUF), a folder with safetensors files, or a model that is named: `org/repo:Q4_K_M` is one of the hub, which is
/// downloaded once, `ollama:NAME` and `lmstudio:PUBLISHER/REPO` are those of other programs. Without a path (NULL) it is the default model,
/// SmolLM2-135M-Instruct, which is downloaded once (98 MB).
/// `options` may be NULL for the defaults, and `progress`, which tells of the download, for none. flapjack_free() frees the
/// model; where it cannot be opened, `*model` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_open(
    path: *const c_char,
    options: *const FlapjackOpenOptions,
    progress: FlapjackProgress,
    data: *mut c_void,
    model: *mut *mut FlapjackModel,
) -> FlapjackStatus {
    call(|| {
        // SAFETY: as the module's documentation says, here and below.
        let model = unsafe { place(model, "the place for the model") }?;
        let given = unsafe { self::options(options, FlapjackOpenOptions::new(0)) }?;
        let cache = unsafe { self::path(given.cache_folder, "the cache folder") }?;
        let path = unsafe { self::path(path, "the path") }?;
        let sequence = SequenceOptions {
            context: match given.context {
                0 => None,
                context => Some(usize::try_from(context).unwrap_or(usize::MAX)),
            },
            ..SequenceOptions::default()
        };
        let options = OpenOptions {
            threads: (given.threads > 0).then_some(given.threads as usize),
            pack: match given.pack {
                0 => Pack::Never,
                _ => Pack::Auto,
            },
            cache,
            ..OpenOptions::default()
        };
        let progress = Progress {
            function: progress,
            data,
        };
        let system = path.is_none().then_some(DEFAULT_SYSTEM);
        let mut events = move |event| progress.tell(event);
        let engine = Engine::open_named(path.as_deref(), options, &mut events)?;
        engine.check_sequence(sequence)?;
        let shared = Arc::new(Shared::new(engine, sequence, system));
        *model = Box::into_raw(Box::new(FlapjackModel { shared }));
        Ok(())
    })
}

/// Frees a model. Conversations with it keep what they need of it until they are freed too. NULL is let be.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_free(model: *mut FlapjackModel) {
    if !model.is_null() {
        call(|| {
            // SAFETY: it came from `flapjack_open`.
            drop(unsafe { Box::from_raw(model) });
            Ok(())
        });
    }
}

/// Calls off what a call on another thread is doing with the model: pruning and writing to a file return
/// FLAPJACK_STATUS_CANCELLED, an answer ends as far as it went. It does nothing else, and may be called by a handler of signals.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_cancel(model: *const FlapjackModel) {
    // SAFETY: as the module's documentation says of handles.
    if let Some(model) = unsafe { model.as_ref() } {
        model.shared.cancel();
    }
}

// ---- looking ----

/// What a model is now.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct FlapjackInfo {
    pub parameters: u64,
    /// Bytes of all weights.
    pub bytes: u64,
    pub layers: u64,
    /// Tokens of the vocabulary.
    pub vocabulary: u64,
    /// Tokens that a text may have, as it was opened.
    pub context: u64,
    /// Threads that it is computed with.
    pub threads: u32,
    /// 1 if it has been pruned since it was opened, else 0.
    pub pruned: i32,
    /// 1 if it has a chat template, so that conversations are possible, else 0.
    pub chat: i32,
    /// Always 0.
    pub reserved: i32,
}

// SAFETY: numbers.
unsafe impl Plain for FlapjackInfo {}

/// Tells what a model is now. `size` is that of `*info`, as the caller knows it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_info(
    model: *const FlapjackModel,
    info: *mut FlapjackInfo,
    size: usize,
) -> FlapjackStatus {
    call(|| {
        if info.is_null() {
            return Err(is_null("the place for the information"));
        }
        // SAFETY: as the module's documentation says, here and below.
        let shared = unsafe { shared(model) }?;
        let engine = shared.take()?;
        let report = engine.report();
        let config = &engine.model().config;
        let now = FlapjackInfo {
            parameters: report.parameters as u64,
            bytes: report.bytes as u64,
            layers: report.layers as u64,
            vocabulary: config.vocabulary as u64,
            context: shared.sequence.context.unwrap_or(config.context_length) as u64,
            threads: u32::try_from(report.threads).unwrap_or(u32::MAX),
            pruned: engine.pruned().is_some().into(),
            chat: engine.chat_template().is_ok().into(),
            reserved: 0,
        };
        unsafe { fill(info, size, &now) };
        Ok(())
    })
}

/// What [`flapjack_report_json`] tells.
#[derive(Serialize)]
struct Report<'a> {
    model: ModelReport,
    pruned: Option<&'a PruneReport>,
    notices: &'a [Notice],
}

/// All that is known of a model, as JSON: "model" (what was opened, and how), "pruned" (what pruning did, null before) and "notices"
/// (what may be worth knowing). flapjack_string_free() frees the text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_report_json(
    model: *const FlapjackModel,
    json: *mut *mut c_char,
) -> FlapjackStatus {
    call(|| {
        // SAFETY: as the module's documentation says, here and below.
        let json = unsafe { place(json, "the place for the text") }?;
        let shared = unsafe { shared(model) }?;
        let engine = shared.take()?;
        let report = Report {
            model: engine.report(),
            pruned: engine.pruned(),
            notices: engine.notices(),
        };
        let text = serde_json::to_string(&report);
        *json = given_text(text.map_err(|error| {
            Failure::new(
                FlapjackStatus::Failed,
                format!("the report cannot be written: {error}"),
            )
        })?);
        Ok(())
    })
}

// ---- pruning ----

/// What pruning is to reach.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlapjackTarget {
    /// A share of the layers' weights that goes, at least 0 and below 0.9.
    Ratio = 0,
    /// Bytes that all weights may have.
    Bytes = 1,
    /// How many times as fast generation shall be.
    Speedup = 2,
    /// A share by which the perplexity of held-back text may rise: 0.1 for a tenth.
    PerplexityRise = 3,
}

/// How to prune. flapjack_prune_options_default() fills it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct FlapjackPruneOptions {
    /// The size of this struct; filled by the function.
    pub size: usize,
    /// What `amount` is, a number of FlapjackTarget: by default FLAPJACK_TARGET_RATIO.
    pub target: i32,
    /// Always 0.
    pub reserved: i32,
    /// How much of it; by default 0.3.
    pub amount: f64,
    /// The method: "best", "flap", "wanda-sp" or "magnitude-sp"; NULL for the best one.
    pub method: *const c_char,
    /// How much time may be spent: "fast", "normal" or "best"; NULL for normal.
    pub effort: *const c_char,
    /// A text file, or a folder of them, to calibrate on; NULL for the built-in text.
    pub calibration: *const c_char,
    /// Tokens of it to use at most; 0 for what the effort asks for.
    pub calibration_tokens: u64,
    /// Single weights that go, after heads and channels: "METHOD:SHARE" or "METHOD:N:M", such as "wanda:0.5" or "sparsegpt:2:4"; NULL for
    /// none. With the ratio 0 they go alone.
    pub sparse: *const c_char,
    /// How these are shared out among the modules: "even" or "curves"; NULL for even.
    pub allocate: *const c_char,
    /// What becomes of projections that lose single weights: "sparse", which takes fewer bytes, and in files of flapjack_export() is for
    /// flapjack alone; "zeros", which takes as many as before and is for all programs; "auto" or NULL for sparse, except for types that
    /// this machine is slower with then.
    pub sparse_form: *const c_char,
}

// SAFETY: numbers and pointers, the first a `usize`.
unsafe impl Plain for FlapjackPruneOptions {}
// SAFETY: as above.
unsafe impl Options for FlapjackPruneOptions {
    const FILLED_BY: &str = "flapjack_prune_options_default";
}

impl FlapjackPruneOptions {
    fn new(size: usize) -> Self {
        Self {
            size,
            target: FlapjackTarget::Ratio as i32,
            reserved: 0,
            amount: 0.3,
            method: ptr::null(),
            effort: ptr::null(),
            calibration: ptr::null(),
            calibration_tokens: 0,
            sparse: ptr::null(),
            allocate: ptr::null(),
            sparse_form: ptr::null(),
        }
    }
}

/// Fills options for flapjack_prune() with defaults. `size` is their size, as the caller knows it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_prune_options_default(
    options: *mut FlapjackPruneOptions,
    size: usize,
) {
    // SAFETY: as the module's documentation says of structs.
    unsafe { fill_options(options, size, &FlapjackPruneOptions::new(size)) };
}

/// What pruning did. flapjack_report_json() has more.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct FlapjackPruneReport {
    /// The ratio that the target came to.
    pub ratio: f64,
    /// The share of the layers' weights that is gone.
    pub removed: f64,
    /// Parameters of the whole model.
    pub parameters_before: u64,
    pub parameters_after: u64,
    /// Bytes of all weights.
    pub bytes_before: u64,
    pub bytes_after: u64,
    /// What pruning took, without calibration and search.
    pub seconds: f64,
    /// 1 if the outcome of an earlier run was taken from the cache folder, else 0.
    pub repeated: i32,
    /// Always 0.
    pub reserved: i32,
}

// SAFETY: numbers.
unsafe impl Plain for FlapjackPruneReport {}

impl From<&PruneReport> for FlapjackPruneReport {
    fn from(report: &PruneReport) -> Self {
        Self {
            ratio: report.ratio,
            removed: report.removed,
            parameters_before: report.before.parameters as u64,
            parameters_after: report.after.parameters as u64,
            bytes_before: report.before.bytes as u64,
            bytes_after: report.after.bytes as u64,
            seconds: report.time.as_secs_f64(),
            repeated: report.repeated.into(),
            reserved: 0,
        }
    }
}

/// Prunes a model in place. `options` may be NULL for the defaults, `progress` and `report` for none; `size` is that of `*report`, as
/// the caller knows it. The file stays as it is. Where pruning fails or is called off, the model is as it was. A model is
/// pruned once; flapjack_reopen() comes before another time. Conversations go on, and read anew what was said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_prune(
    model: *mut FlapjackModel,
    options: *const FlapjackPruneOptions,
    progress: FlapjackProgress,
    data: *mut c_void,
    report: *mut FlapjackPruneReport,
    size: usize,
) -> FlapjackStatus {
    call(|| {
        // SAFETY: as the module's documentation says, here and below.
        let shared = unsafe { shared(model) }?;
        let options = unsafe { prune_options(options) }?;
        let mut engine = shared.take()?;
        let progress = Progress {
            function: progress,
            data,
        };
        let pruned = engine.prune(&options, &mut progress.events(&shared));
        let pruned = pruned.map_err(|error| put_back(&mut engine, error))?;
        unsafe { fill(report, size, &(&pruned).into()) };
        Ok(())
    })
}

/// The failure for an error of pruning. Where layers were pruned already, the model is opened again.
fn put_back(engine: &mut Engine, error: EngineError) -> Failure {
    let broken_off = engine.is_touched() && engine.pruned().is_none();
    let mut failure = Failure::from(error);
    if broken_off && let Err(error) = engine.reopen() {
        let Failure { words, .. } = Failure::from(error);
        failure = Failure::new(
            FlapjackStatus::State,
            format!(
                "{}; some layers are pruned already, and the model's file cannot be opened again: {words}",
                failure.words
            ),
        );
    }
    failure
}

/// # Safety
/// As the module's documentation says of structs and texts.
unsafe fn prune_options(given: *const FlapjackPruneOptions) -> Result<PruneOptions, Failure> {
    // SAFETY: as the caller promises, here and below.
    let given = unsafe { options(given, FlapjackPruneOptions::new(0)) }?;
    let mut options = PruneOptions {
        target: target(given.target, given.amount)?,
        ..PruneOptions::default()
    };
    if let Some(method) = unsafe { choice(given.method, "the method") }? {
        options.method.method = method;
    }
    if let Some(effort) = unsafe { choice(given.effort, "the effort") }? {
        options.method.effort = effort;
    }
    if let Some(path) = unsafe { path(given.calibration, "the path of the calibration text") }? {
        options.calibration.source = TextSource::Path(path);
    }
    if let Ok(tokens @ 1..) = usize::try_from(given.calibration_tokens) {
        options.calibration.tokens = Some(tokens);
    }
    options.sparse = unsafe { sparse_options(&given) }?;
    Ok(options)
}

/// # Safety
/// As the module's documentation says of texts.
unsafe fn sparse_options(given: &FlapjackPruneOptions) -> Result<Option<SparseOptions>, Failure> {
    // SAFETY: as the caller promises, here and below.
    let sparsity: Option<Sparsity> = unsafe { choice(given.sparse, "the single weights") }?;
    let allocate = unsafe { choice(given.allocate, "the way of sharing out") }?;
    let form = unsafe { choice(given.sparse_form, "the form") }?;
    let Some(sparsity) = sparsity else {
        return match allocate.is_some() || form.is_some() {
            true => Err(Failure::argument(
                "the options say how single weights go, and not which; \"sparse\" does",
            )),
            false => Ok(None),
        };
    };
    Ok(Some(SparseOptions {
        sparsity,
        allocate: allocate.unwrap_or_default(),
        form: form.unwrap_or_default(),
    }))
}

fn target(target: i32, amount: f64) -> Result<Target, Failure> {
    let number_of = |target: FlapjackTarget| target as i32;
    let target = match target {
        // The engine knows the ranges.
        n if n == number_of(FlapjackTarget::Ratio) => Target::Ratio(amount),
        n if n == number_of(FlapjackTarget::Bytes) => match amount > 0.0 && amount.is_finite() {
            true => Target::Bytes(amount as u64),
            false => {
                return Err(Failure::argument(format!(
                    "the bytes must be a number above 0, and not {amount}"
                )));
            }
        },
        n if n == number_of(FlapjackTarget::Speedup) => Target::Speedup(amount),
        n if n == number_of(FlapjackTarget::PerplexityRise) => Target::PerplexityRise(amount),
        n => {
            return Err(Failure::argument(format!(
                "there is no target of pruning with the number {n}"
            )));
        }
    };
    Ok(target)
}

/// What a name stands for; `None` for NULL.
///
/// # Safety
/// As for [`text`].
unsafe fn choice<T: FromStr<Err = String>>(
    name: *const c_char,
    what: &str,
) -> Result<Option<T>, Failure> {
    // SAFETY: as the caller promises.
    let name = unsafe { text(name, what) }?;
    name.map(str::parse).transpose().map_err(Failure::argument)
}

/// Opens the model's file again: the model is then as its file has it, whatever was done to it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_reopen(model: *mut FlapjackModel) -> FlapjackStatus {
    call(|| {
        // SAFETY: as the module's documentation says of handles.
        let shared = unsafe { shared(model) }?;
        Ok(shared.take()?.reopen()?)
    })
}

/// Writes the model as it is now to a GGUF file, which llama.cpp runs too unless projections are sparse. `progress` may be NULL for none. What is at `path` is
/// replaced in the end, and stays where writing fails or is called off.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_export(
    model: *mut FlapjackModel,
    path: *const c_char,
    progress: FlapjackProgress,
    data: *mut c_void,
) -> FlapjackStatus {
    call(|| {
        // SAFETY: as the module's documentation says, here and below.
        let shared = unsafe { shared(model) }?;
        let path = unsafe { self::path(path, "the path") }?;
        let path = path.ok_or_else(|| is_null("the path"))?;
        let progress = Progress {
            function: progress,
            data,
        };
        let mut engine = shared.take()?;
        engine.export_with(path, &mut progress.events(&shared))?;
        Ok(())
    })
}
