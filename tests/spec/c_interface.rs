//! The interface for C: the header is up to date, programs in C run under the address sanitizer, and what is asked for wrongly is
//! refused in words.

use std::env;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::ptr;

use crate::common::engine::{CACHE, Workshop};
use crate::common::{copy_of, skip};
use flapjack::engine::GenerateOptions;
use flapjack::ffi::*;
use flapjack::generate::SamplerConfig;
use flapjack::gguf::{GgufFile, Value};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn path_of(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

// ---- the header ----

#[test]
fn the_header_is_what_cbindgen_makes_of_the_source() {
    let config = cbindgen::Config::from_file(path_of("cbindgen.toml")).unwrap();
    let files = ["status", "values", "model", "generate", "conversation"];
    let mut builder = cbindgen::Builder::new().with_config(config);
    for file in files {
        builder = builder.with_src(path_of(&format!("src/ffi/{file}.rs")));
    }
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    let made = String::from_utf8(made).unwrap();
    let header = path_of("include/flapjack.h");
    if env::var_os("FLAPJACK_WRITE_HEADER").is_some() {
        fs::write(&header, &made).unwrap();
    }
    assert!(
        fs::read_to_string(&header).is_ok_and(|there| there == made),
        "include/flapjack.h is out of date; this makes it anew:\n\
         FLAPJACK_WRITE_HEADER=1 cargo test --test spec c_interface::the_header"
    );
    // Everything that is public is in it.
    let source = fs::read_to_string(path_of("src/ffi/mod.rs")).unwrap();
    let words = source.split(|c: char| !c.is_alphanumeric() && c != '_');
    let names = words.filter(|word| word.starts_with("flapjack_") || word.starts_with("Flapjack"));
    for name in names {
        assert!(made.contains(name), "{name} is not in the header");
    }
}

// ---- programs in C ----

/// How a program gets the library.
#[derive(Clone, Copy)]
enum Link {
    Shared,
    Static,
}

const WARNINGS: [&str; 5] = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"];

/// What the library needs of the system where it is linked statically.
const SYSTEM: [&str; 5] = ["-lpthread", "-ldl", "-lrt", "-lutil", "-lm"];

/// What the address sanitizer can find out here.
#[derive(Clone, Copy)]
enum Sanitizer {
    /// Wrong uses of memory.
    Misuse,
    /// And memory that nobody frees.
    AndLeaks,
}

/// A program that leaks.
const LEAKS: &str = "#include <stdlib.h>
char *volatile kept;
int main(void) { kept = malloc(7); kept = NULL; return 0; }
";

/// Whether programs in C can be compiled and run with the address sanitizer; notes a skip if not.
fn sanitizer(folder: &Path) -> Option<Sanitizer> {
    if !cfg!(target_os = "linux") {
        skip("programs in C are compiled on Linux only");
        return None;
    }
    let source = folder.join("leaks.c");
    let program = folder.join("leaks");
    fs::write(&source, LEAKS).unwrap();
    let mut cc = Command::new("cc");
    cc.arg("-fsanitize=address")
        .arg(&source)
        .arg("-o")
        .arg(&program);
    let Ok(compiled) = cc.output() else {
        skip("there is no cc");
        return None;
    };
    let runs = |leaks| {
        let mut command = Command::new(&program);
        let run = command.env("ASAN_OPTIONS", leaks).output();
        run.map(|run| {
            (
                run.status.success(),
                String::from_utf8_lossy(&run.stderr).into_owned(),
            )
        })
    };
    if !compiled.status.success() || !runs(NO_LEAKS).is_ok_and(|(succeeds, _)| succeeds) {
        skip("cc has no address sanitizer that works");
        return None;
    }
    let (_, said) = runs(LEAKS_TOO).unwrap();
    if said.contains("detected memory leaks") {
        return Some(Sanitizer::AndLeaks);
    }
    skip("leaks cannot be looked for here, as under a debugger");
    Some(Sanitizer::Misuse)
}

const NO_LEAKS: &str = "detect_leaks=0";
const LEAKS_TOO: &str = "detect_leaks=1";

/// The folder that cargo puts libraries in for tests.
fn libraries() -> PathBuf {
    let test = env::current_exe().unwrap();
    test.parent().unwrap().to_owned()
}

/// Compiles a program with all warnings as errors.
fn compile(source: &str, link: Link, folder: &Path) -> PathBuf {
    let program = folder.join(Path::new(source).file_stem().unwrap());
    let libraries = libraries();
    let mut cc = Command::new("cc");
    cc.args(WARNINGS)
        .arg("-g")
        .arg("-fsanitize=address")
        .arg("-I")
        .arg(path_of("include"))
        .arg(path_of(source))
        .arg("-o")
        .arg(&program);
    match link {
        Link::Static => {
            cc.arg(libraries.join("libflapjack.a")).args(SYSTEM);
        }
        Link::Shared => {
            let path = format!("-Wl,-rpath,{}", libraries.display());
            cc.arg("-L").arg(&libraries).arg("-lflapjack").arg(path);
        }
    }
    let output = cc.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{source}: {said}");
    program
}

/// Runs a program that must leak nothing, as far as that can be found out.
fn run(program: &Path, sanitizer: Sanitizer, arguments: &[&str], cache: &Path) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).env("FLAPJACK_CACHE", cache);
    command.env("HF_HUB_OFFLINE", "1");
    let options = match sanitizer {
        Sanitizer::Misuse => NO_LEAKS,
        Sanitizer::AndLeaks => LEAKS_TOO,
    };
    command.env("ASAN_OPTIONS", options).output().unwrap()
}

fn succeeded(output: &Output) -> (String, String) {
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{}\n{out}\n{said}", output.status);
    (out, said)
}

/// The workshop's model with a chat template in it.
fn with_template(workshop: &Workshop) -> PathBuf {
    let file = GgufFile::open(&workshop.model).unwrap();
    let mut writer = copy_of(&file);
    let template =
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] ";
    writer.metadata("tokenizer.chat_template", Value::String(template.into()));
    let path = workshop.path("chat.gguf");
    writer.save(&path).unwrap();
    path
}

#[test]
fn the_example_runs_under_the_address_sanitizer() {
    let workshop = Workshop::new();
    let folder = workshop.path("");
    let Some(sanitizer) = sanitizer(&folder) else {
        return;
    };
    let example = compile("docs/example.c", Link::Shared, &folder);
    let chat = with_template(&workshop);
    for model in [&workshop.model, &chat] {
        let model = model.to_str().unwrap();
        let output = run(
            &example,
            sanitizer,
            &[model, "0.3", "Once upon a time"],
            &folder,
        );
        let (text, said) = succeeded(&output);
        assert!(text.len() > 1, "there is an answer");
        for words in [
            "calibrating: ",
            "pruning: ",
            "of the layers' weights are gone",
            "tokens in",
        ] {
            assert!(said.contains(words), "{words} in {said}");
        }
    }
    let output = run(&example, sanitizer, &["nowhere.gguf", "0.3", ""], &folder);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.starts_with("error: ") && said.contains("nowhere.gguf"),
        "{said}"
    );
}

#[test]
fn misuse_is_refused_in_words_under_the_address_sanitizer() {
    let workshop = Workshop::new();
    let folder = workshop.path("");
    let Some(sanitizer) = sanitizer(&folder) else {
        return;
    };
    let misuse = compile("tests/data/c/misuse.c", Link::Static, &folder);
    let chat = with_template(&workshop);
    let cache = workshop.path(CACHE);
    let arguments = [chat.to_str().unwrap(), cache.to_str().unwrap()];
    let (text, _) = succeeded(&run(&misuse, sanitizer, &arguments, &folder));
    assert_eq!(text, "all is well\n");
}

#[test]
fn the_shared_library_shows_nothing_but_the_interface() {
    if !cfg!(target_os = "linux") {
        return skip("what a shared library shows is looked at on Linux only");
    }
    let library = libraries().join("libflapjack.so");
    let Ok(output) = Command::new("nm")
        .args(["-D", "--defined-only"])
        .arg(&library)
        .output()
    else {
        return skip("there is no nm");
    };
    let shown = String::from_utf8(output.stdout).unwrap();
    let mut shown: Vec<&str> = shown
        .lines()
        .filter_map(|line| line.split(' ').next_back())
        .collect();
    shown.sort_unstable();
    let header = fs::read_to_string(path_of("include/flapjack.h")).unwrap();
    let words = header.split(|c: char| !c.is_alphanumeric() && c != '_');
    let mut named: Vec<&str> = words.filter(|word| word.starts_with("flapjack_")).collect();
    named.sort_unstable();
    named.dedup();
    assert_eq!(shown, named);
}

/// Without a name of its own a program that was linked with it looks for it under the path that the linker was given.
#[test]
fn the_shared_library_has_a_name() {
    if !cfg!(target_os = "linux") {
        return skip("names of shared libraries are looked at on Linux only");
    }
    let library = libraries().join("libflapjack.so");
    let Ok(output) = Command::new("readelf").arg("-d").arg(&library).output() else {
        return skip("there is no readelf");
    };
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(
        shown.contains("Library soname: [libflapjack.so]"),
        "{shown}"
    );
}

#[test]
fn the_program_of_the_guide_compiles() {
    let guide = fs::read_to_string(path_of("docs/library.md")).unwrap();
    let (_, program) = guide.split_once("\n```c\n").unwrap();
    let (program, _) = program.split_once("```").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("guide.c");
    fs::write(&source, program).unwrap();
    let mut cc = Command::new("cc");
    cc.args(WARNINGS)
        .args(["-fsyntax-only", "-I"])
        .arg(path_of("include"))
        .arg(&source);
    let Ok(output) = cc.output() else {
        return skip("there is no cc");
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn the_header_is_cpp_too() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("header.cpp");
    fs::write(
        &source,
        "#include <flapjack.h>\nint main() { return flapjack_version() == nullptr; }\n",
    )
    .unwrap();
    let mut cc = Command::new("c++");
    cc.args([
        "-std=c++11",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-c",
        "-I",
    ]);
    cc.arg(path_of("include"))
        .arg(&source)
        .arg("-o")
        .arg(folder.path().join("header.o"));
    let Ok(output) = cc.output() else {
        return skip("there is no c++");
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

// ---- what comes of calls, from Rust ----

fn c(text: impl AsRef<Path>) -> CString {
    CString::new(text.as_ref().to_str().unwrap()).unwrap()
}

fn last_error() -> String {
    // SAFETY: it is a text, and no other call comes between.
    let words = unsafe { CStr::from_ptr(flapjack_last_error()) };
    words.to_str().unwrap().to_owned()
}

/// A model as C has it.
struct Handle(*mut FlapjackModel);

impl Handle {
    fn open(workshop: &Workshop, path: &Path) -> Self {
        let mut options = FlapjackOpenOptions {
            size: 0,
            threads: 0,
            pack: 0,
            context: 0,
            cache_folder: ptr::null(),
        };
        let cache = c(workshop.path(CACHE));
        let mut model = ptr::null_mut();
        // SAFETY: every pointer is to what the header says.
        let status = unsafe {
            flapjack_open_options_default(&mut options, size_of_val(&options));
            options.threads = 1;
            options.cache_folder = cache.as_ptr();
            flapjack_open(
                c(path).as_ptr(),
                &options,
                None,
                ptr::null_mut(),
                &mut model,
            )
        };
        assert_eq!(status, FlapjackStatus::Ok, "{}", last_error());
        Self(model)
    }

    fn info(&self) -> FlapjackInfo {
        let mut info = FlapjackInfo::default();
        // SAFETY: every pointer is to what the header says.
        let status = unsafe { flapjack_info(self.0, &mut info, size_of_val(&info)) };
        assert_eq!(status, FlapjackStatus::Ok, "{}", last_error());
        info
    }

    fn options(&self) -> FlapjackGenerateOptions {
        let mut options = std::mem::MaybeUninit::uninit();
        // SAFETY: it fills all of them.
        unsafe {
            flapjack_generate_options_default(self.0, options.as_mut_ptr(), size_of_val(&options));
            options.assume_init()
        }
    }

    fn generate(
        &self,
        prompt: &str,
        options: &FlapjackGenerateOptions,
        until: usize,
    ) -> Result<(String, FlapjackAnswer), (FlapjackStatus, String)> {
        let mut listener = Listener {
            until,
            text: String::new(),
        };
        let mut answer = FlapjackAnswer::default();
        // SAFETY: every pointer is to what the header says.
        let status = unsafe {
            flapjack_generate(
                self.0,
                c(prompt).as_ptr(),
                options,
                Some(Listener::hear),
                (&raw mut listener).cast(),
                &mut answer,
                size_of_val(&answer),
            )
        };
        match status {
            FlapjackStatus::Ok => Ok((listener.text, answer)),
            status => Err((status, last_error())),
        }
    }

    fn prune(
        &self,
        change: impl FnOnce(&mut FlapjackPruneOptions),
        progress: FlapjackProgress,
    ) -> Result<FlapjackPruneReport, (FlapjackStatus, String)> {
        let method = c"flap";
        let mut options = std::mem::MaybeUninit::uninit();
        let mut report = FlapjackPruneReport::default();
        // SAFETY: every pointer is to what the header says.
        let status = unsafe {
            flapjack_prune_options_default(options.as_mut_ptr(), size_of_val(&options));
            let mut options = options.assume_init();
            options.method = method.as_ptr();
            options.calibration_tokens = 512;
            change(&mut options);
            let size = size_of_val(&report);
            flapjack_prune(
                self.0,
                &options,
                progress,
                ptr::null_mut(),
                &mut report,
                size,
            )
        };
        match status {
            FlapjackStatus::Ok => Ok(report),
            status => Err((status, last_error())),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: it is freed here only.
        unsafe { flapjack_free(self.0) };
    }
}

/// Hears text until there are so many bytes of it.
struct Listener {
    until: usize,
    text: String,
}

impl Listener {
    unsafe extern "C" fn hear(text: *const c_char, length: usize, data: *mut c_void) -> c_int {
        // SAFETY: it is the listener that was given, and a text of this length.
        let (listener, text) = unsafe { (&mut *data.cast::<Listener>(), CStr::from_ptr(text)) };
        assert_eq!(text.count_bytes(), length);
        listener.text += text.to_str().unwrap();
        (listener.text.len() >= listener.until).into()
    }
}

unsafe extern "C" fn cancel_pruning(
    stage: *const c_char,
    done: u64,
    _: u64,
    _: *mut c_void,
) -> c_int {
    // SAFETY: it is a text.
    let stage = unsafe { CStr::from_ptr(stage) };
    (stage == c"pruning" && done > 0).into()
}

#[test]
fn text_is_what_the_engine_writes_and_ends_where_the_callback_says() {
    let workshop = Workshop::new();
    let model = Handle::open(&workshop, &workshop.model);
    let mut options = model.options();
    options.temperature = 0.0;
    options.max_tokens = 24;
    let (text, answer) = model.generate("Hello", &options, usize::MAX).unwrap();
    let engine = workshop.open();
    let theirs = GenerateOptions {
        max_tokens: 24,
        sampler: SamplerConfig::greedy(),
        ..GenerateOptions::default()
    };
    let mut sequence = engine.sequence();
    let pieces = engine.generate(&mut sequence, "Hello", &theirs).unwrap();
    let expected: String = pieces.map(Result::unwrap).collect();
    assert_eq!(text, expected);
    assert_eq!(answer.tokens, 24);
    assert_eq!(answer.finish, FlapjackFinish::Length as i32);
    assert!(answer.prompt_tokens >= 5 && answer.prompt_seconds > 0.0);

    let (part, answer) = model.generate("Hello", &options, 4).unwrap();
    assert!(expected.starts_with(&part) && part.len() < expected.len());
    assert_eq!(answer.finish, FlapjackFinish::Stopped as i32);

    // Texts that end an answer are a list.
    let stop = CString::new(&*expected.chars().skip(6).take(1).collect::<String>()).unwrap();
    let list = [c"never to be seen".as_ptr(), stop.as_ptr(), ptr::null()];
    options.stop = list.as_ptr();
    let (part, answer) = model.generate("Hello", &options, usize::MAX).unwrap();
    assert_eq!(answer.finish, FlapjackFinish::Stop as i32);
    assert!(expected.starts_with(&part) && part.len() < expected.len());

    let (status, words) = model
        .generate(&"word ".repeat(1000), &options, 1)
        .unwrap_err();
    assert_eq!(status, FlapjackStatus::TooLong, "{words}");
}

#[test]
fn an_answer_is_held_to_a_json_schema() {
    let workshop = Workshop::new();
    let model = Handle::open(&workshop, &workshop.model);
    let mut options = model.options();
    let schema = c(r#"{"enum": ["yes", "no"]}"#);
    options.json_schema = schema.as_ptr();
    let (text, answer) = model.generate("Hello", &options, usize::MAX).unwrap();
    assert!(text == "\"yes\"" || text == "\"no\"", "{text}");
    assert_eq!(answer.finish, FlapjackFinish::End as i32);
}

#[test]
fn pruning_reports_and_leaves_the_model_as_it_was_where_it_is_called_off() {
    let workshop = Workshop::new();
    let model = Handle::open(&workshop, &workshop.model);
    let mut options = model.options();
    options.temperature = 0.0;
    options.max_tokens = 16;
    let before = model.info();
    let dense = model.generate("Hello", &options, usize::MAX).unwrap().0;

    let (status, words) = model.prune(|_| {}, Some(cancel_pruning)).unwrap_err();
    assert_eq!(
        (status, words.as_str()),
        (FlapjackStatus::Cancelled, "cancelled")
    );
    assert_eq!(model.info().bytes, before.bytes);
    assert_eq!(
        model.generate("Hello", &options, usize::MAX).unwrap().0,
        dense
    );

    let report = model.prune(|_| {}, None).unwrap();
    let now = model.info();
    assert!((report.removed - 0.3).abs() < 0.1 && report.ratio == 0.3);
    assert_eq!(
        (report.bytes_before, report.bytes_after),
        (before.bytes, now.bytes)
    );
    assert_eq!(
        (report.parameters_before, report.parameters_after),
        (before.parameters, now.parameters)
    );
    assert!(now.bytes < before.bytes && now.pruned == 1 && before.pruned == 0);
    let (status, words) = model.prune(|_| {}, None).unwrap_err();
    assert_eq!(status, FlapjackStatus::State, "{words}");
    let pruned = model.generate("Hello", &options, usize::MAX).unwrap().0;

    // The file that is written says the same.
    let small = workshop.path("small.gguf");
    // SAFETY: every pointer is to what the header says.
    let status = unsafe { flapjack_export(model.0, c(&small).as_ptr(), None, ptr::null_mut()) };
    assert_eq!(status, FlapjackStatus::Ok, "{}", last_error());
    let exported = Handle::open(&workshop, &small);
    assert!(exported.info().bytes < before.bytes);
    assert_eq!(
        exported.generate("Hello", &options, usize::MAX).unwrap().0,
        pruned
    );

    // SAFETY: it is a model.
    assert_eq!(unsafe { flapjack_reopen(model.0) }, FlapjackStatus::Ok);
    assert_eq!(
        model.generate("Hello", &options, usize::MAX).unwrap().0,
        dense
    );
    let limit = before.bytes - 5000;
    let by_size = |options: &mut FlapjackPruneOptions| {
        options.target = FlapjackTarget::Bytes as i32;
        options.amount = limit as f64;
    };
    let report = model.prune(by_size, None).unwrap();
    assert!(report.bytes_after <= limit);
}

#[test]
fn single_weights_go_alone_or_after_heads_and_channels() {
    let workshop = Workshop::new();
    let model = Handle::open(&workshop, &workshop.model);
    let (sparse, groups, zeros) = (c"magnitude:0.5", c"wanda:2:4", c"zeros");
    let mut options = model.options();
    options.temperature = 0.0;
    options.max_tokens = 16;
    let mut texts = Vec::new();
    for form in [ptr::null(), zeros.as_ptr()] {
        let before = model.info();
        let alone = |options: &mut FlapjackPruneOptions| {
            options.amount = 0.0;
            options.sparse = sparse.as_ptr();
            options.sparse_form = form;
        };
        let report = model.prune(alone, None).unwrap();
        let smaller = report.bytes_after < report.bytes_before;
        assert_eq!((report.removed, smaller), (0.0, form.is_null()));
        assert_eq!(
            (report.bytes_before, report.bytes_after),
            (before.bytes, model.info().bytes)
        );
        texts.push(model.generate("Hello", &options, usize::MAX).unwrap().0);
        // SAFETY: it is a model.
        assert_eq!(unsafe { flapjack_reopen(model.0) }, FlapjackStatus::Ok);
    }
    assert_eq!(texts[0], texts[1]);
    let both = |options: &mut FlapjackPruneOptions| options.sparse = groups.as_ptr();
    let report = model.prune(both, None).unwrap();
    assert!(report.removed > 0.0 && report.bytes_after < report.bytes_before);

    // SAFETY: it is a model.
    assert_eq!(unsafe { flapjack_reopen(model.0) }, FlapjackStatus::Ok);
    let (odd, curves, what) = (c"wanda:2:7", c"curves", c"wanda");
    let refused = |change: &dyn Fn(&mut FlapjackPruneOptions), words: &str| {
        let (status, said) = model.prune(change, None).unwrap_err();
        assert_eq!(status, FlapjackStatus::Argument, "{said}");
        assert!(said.contains(words), "{said}");
    };
    refused(&|o| o.sparse = what.as_ptr(), "needs a share or N:M");
    refused(&|o| o.sparse = odd.as_ptr(), "groups of 7 columns");
    refused(&|o| o.allocate = curves.as_ptr(), "and not which");
    refused(
        &|o| (o.sparse, o.allocate) = (sparse.as_ptr(), zeros.as_ptr()),
        "there are even, curves",
    );
    refused(
        &|o| (o.sparse, o.sparse_form) = (sparse.as_ptr(), curves.as_ptr()),
        "there are auto, sparse, zeros",
    );
    refused(
        &|o| (o.sparse, o.allocate) = (groups.as_ptr(), curves.as_ptr()),
        "curves",
    );
    for amount in [f64::NAN, f64::INFINITY, 0.0] {
        for target in [
            FlapjackTarget::Speedup,
            FlapjackTarget::PerplexityRise,
            FlapjackTarget::Bytes,
        ] {
            refused(
                &|o| (o.target, o.amount) = (target as i32, amount),
                "must be a number above 0",
            );
        }
    }
}

/// A program that was compiled before there were single weights has options that end earlier.
#[test]
fn options_of_an_earlier_header_prune_as_before() {
    let workshop = Workshop::new();
    let model = Handle::open(&workshop, &workshop.model);
    let report = model.prune(
        |options| {
            options.size = std::mem::offset_of!(FlapjackPruneOptions, sparse);
            // It is not theirs any more.
            options.sparse = ptr::without_provenance(1);
        },
        None,
    );
    assert!(report.unwrap().removed > 0.0);
}

#[test]
fn what_is_wrong_is_told_before_anything_takes_long() {
    let workshop = Workshop::new();
    let model = Handle::open(&workshop, &workshop.model);
    // It is not asked, since nothing is begun.
    unsafe extern "C" fn call_off(_: *const c_char, _: u64, _: u64, _: *mut c_void) -> c_int {
        1
    }
    for ratio in [-0.1, 0.9, 3.0, f64::NAN] {
        let (status, words) = model
            .prune(|options| options.amount = ratio, Some(call_off))
            .unwrap_err();
        assert_eq!(status, FlapjackStatus::Argument);
        assert!(
            words.contains("ratio") && words.contains("below 0.9"),
            "{words}"
        );
    }
    let effort = c"heroic";
    let (status, words) = model
        .prune(|options| options.effort = effort.as_ptr(), Some(call_off))
        .unwrap_err();
    assert_eq!(status, FlapjackStatus::Argument);
    assert!(
        words.contains("heroic") && words.contains("fast, normal, best"),
        "{words}"
    );

    // A model without a template is no partner for a conversation, and says so at once.
    assert_eq!(model.info().chat, 0);
    let mut conversation = ptr::null_mut();
    // SAFETY: every pointer is to what the header says.
    let status = unsafe { flapjack_conversation_new(model.0, ptr::null(), &mut conversation) };
    assert_eq!(status, FlapjackStatus::State);
    assert!(
        conversation.is_null() && last_error().contains("no chat template"),
        "{}",
        last_error()
    );

    let no_model = workshop.write("text.gguf", "This is no model.");
    let mut handle = ptr::null_mut();
    // SAFETY: every pointer is to what the header says.
    let status = unsafe {
        flapjack_open(
            c(&no_model).as_ptr(),
            ptr::null(),
            None,
            ptr::null_mut(),
            &mut handle,
        )
    };
    assert_eq!(status, FlapjackStatus::File);
    assert!(
        handle.is_null() && last_error().contains("text.gguf"),
        "{}",
        last_error()
    );
}

#[test]
fn the_report_is_json() {
    let workshop = Workshop::new();
    let model = Handle::open(&workshop, &workshop.model);
    let report = |model: &Handle| {
        let mut json = ptr::null_mut();
        // SAFETY: every pointer is to what the header says, and the text is freed once.
        unsafe {
            let status = flapjack_report_json(model.0, &mut json);
            assert_eq!(status, FlapjackStatus::Ok, "{}", last_error());
            let report = serde_json::from_slice(CStr::from_ptr(json).to_bytes());
            flapjack_string_free(json);
            report.unwrap()
        }
    };
    let dense: serde_json::Value = report(&model);
    assert_eq!(dense["model"]["bytes"], model.info().bytes);
    assert!(dense["pruned"].is_null() && dense["notices"].is_array());
    let pruned = model.prune(|_| {}, None).unwrap();
    assert_eq!(
        report(&model)["pruned"]["after"]["bytes"],
        pruned.bytes_after
    );

    // A path may be bytes that are no text.
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::ffi::OsStrExt;
        let path = workshop
            .path("")
            .join(std::ffi::OsStr::from_bytes(b"caf\xe9.gguf"));
        fs::copy(&workshop.model, &path).unwrap();
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        let mut model = ptr::null_mut();
        // SAFETY: every pointer is to what the header says.
        let status = unsafe {
            flapjack_open(
                path.as_ptr(),
                ptr::null(),
                None,
                ptr::null_mut(),
                &mut model,
            )
        };
        assert_eq!(status, FlapjackStatus::Ok, "{}", last_error());
        let shown = report(&Handle(model))["model"]["path"].to_string();
        assert!(shown.contains("caf\u{fffd}.gguf"), "{shown}");
    }
}

#[test]
fn a_call_on_another_thread_is_called_off() {
    let workshop = Workshop::new();
    let model = Handle::open(&workshop, &workshop.model);
    let mut options = model.options();
    options.max_tokens = 1_000_000;
    // The answer calls itself off, as another thread would at this moment.
    unsafe extern "C" fn cancel(_: *const c_char, _: usize, model: *mut c_void) -> c_int {
        let address = model as usize;
        std::thread::spawn(move || {
            // SAFETY: the model is not freed yet.
            unsafe { flapjack_cancel(address as *const FlapjackModel) }
        })
        .join()
        .unwrap();
        0
    }
    let mut answer = FlapjackAnswer::default();
    let ask = |answer: &mut FlapjackAnswer| {
        // SAFETY: every pointer is to what the header says.
        unsafe {
            let size = size_of_val(answer);
            let prompt = c"Hello".as_ptr();
            flapjack_generate(
                model.0,
                prompt,
                &options,
                Some(cancel),
                model.0.cast(),
                answer,
                size,
            )
        }
    };
    assert_eq!(ask(&mut answer), FlapjackStatus::Ok, "{}", last_error());
    assert_eq!(answer.finish, FlapjackFinish::Stopped as i32);
    assert!(answer.tokens < 100);
    // The next call is another matter.
    options.max_tokens = 4;
    let (_, answer) = model.generate("Hello", &options, usize::MAX).unwrap();
    assert_eq!(answer.finish, FlapjackFinish::Length as i32);
}

#[test]
fn a_conversation_keeps_what_was_read_and_reads_it_again_when_the_model_was_pruned() {
    let workshop = Workshop::new();
    let chat = with_template(&workshop);
    let model = Handle::open(&workshop, &chat);
    let mut options = model.options();
    options.temperature = 0.0;
    options.max_tokens = 8;
    let mut conversation = ptr::null_mut();
    let system = c"Be brief.";
    // SAFETY: every pointer is to what the header says, here and below.
    let status = unsafe { flapjack_conversation_new(model.0, system.as_ptr(), &mut conversation) };
    assert_eq!(status, FlapjackStatus::Ok, "{}", last_error());
    let say = |message: &str| {
        let mut listener = Listener {
            until: usize::MAX,
            text: String::new(),
        };
        let mut answer = FlapjackAnswer::default();
        let status = unsafe {
            flapjack_conversation_say(
                conversation,
                c(message).as_ptr(),
                &options,
                Some(Listener::hear),
                (&raw mut listener).cast(),
                &mut answer,
                size_of_val(&answer),
            )
        };
        assert_eq!(status, FlapjackStatus::Ok, "{}", last_error());
        (listener.text, answer)
    };
    let (first, read) = say("One");
    let (_, again) = say("Two");
    assert!(
        again.prompt_tokens < read.prompt_tokens + 8,
        "only what is new"
    );
    model.prune(|_| {}, None).unwrap();
    let (_, anew) = say("Three");
    assert!(anew.prompt_tokens > read.prompt_tokens + again.prompt_tokens);
    // As its file has it, and with nothing said, it answers as at first.
    assert_eq!(unsafe { flapjack_reopen(model.0) }, FlapjackStatus::Ok);
    assert_eq!(
        unsafe { flapjack_conversation_reset(conversation) },
        FlapjackStatus::Ok
    );
    assert_eq!(say("One").0, first);
    let shouted = c"SHOUT.";
    let set = unsafe { flapjack_conversation_set_system(conversation, shouted.as_ptr()) };
    assert_eq!(set, FlapjackStatus::Ok);
    unsafe { flapjack_conversation_reset(conversation) };
    assert_ne!(say("One").0, first);
    unsafe { flapjack_conversation_free(conversation) };
}
