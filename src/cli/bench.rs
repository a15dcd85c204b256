//! `flapjack bench`: the shape of llama-bench, with pruned models and the peer itself in the same run.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::builder::NonEmptyStringValueParser;
use clap::{ArgGroup, Args, ValueEnum};
use flapjack::engine::{
    Cache, CalibrationOptions, Engine, MethodOptions, OpenOptions, Pack, PruneOptions,
    SyntheticType, Target, TemporaryFile, TextSource,
};
use flapjack::eval::{SpeedTest, mean_and_deviation, median};
use flapjack::hub;
use flapjack::model::{CacheType, Shape};
use flapjack::prune::Restore;
use flapjack::prune::sparse::Sparsity;
use serde::{Deserialize, Serialize};

use super::arguments::{
    AMOUNT, CacheArgs, Given, MachineArgs, MethodArgs, ModelArgs, WithAmount, WrongUse, of_hub,
    parse_ratio, parse_sparsity, whole,
};
use super::interrupt::{self, Watch};
use super::overrides::OverrideArgs;
use super::progress::{Unit, Work};
use super::{heading, progress, streams, words};

#[derive(Debug, Args)]
// Loss curves would only cost time, since speed hardly depends on which units go.
#[command(mut_arg("effort", |effort| effort.default_value("fast")))]
#[command(group = ArgGroup::new(AMOUNT).args(["prune", "sparse"]).multiple(true))]
pub struct BenchArgs {
    #[command(flatten)]
    given: Given,
    /// Models by file or name [default: SmolLM2-135M-Instruct]
    ///
    /// A name is one of the hub, like org/repo:Q4_K_M, or ollama:NAME, or lmstudio:PUBLISHER/REPO. May be given several times.
    #[arg(help_heading = heading::MODEL, short, long, value_name = "FILE")]
    model: Vec<PathBuf>,
    /// A model of the hub: ORG/REPO, ORG/REPO:TYPE or ORG/REPO/FILE
    ///
    /// May be given several times.
    #[arg(help_heading = heading::MODEL, long, visible_alias = "hf-repo", value_name = "REPO", value_parser = NonEmptyStringValueParser::new())]
    hf: Vec<String>,
    /// Also time a random model of this size
    ///
    /// It is made in memory, in the shape of Llama 3.2 1B or Llama 2 7B. May be given several times.
    #[arg(help_heading = heading::MODEL, long, value_name = "SIZE", value_enum)]
    synthetic: Vec<Size>,
    /// The type of random weights
    #[arg(help_heading = heading::MODEL, long, value_name = "TYPE", value_enum, default_value_t = TypeName::Q4_0, requires = "synthetic")]
    synthetic_type: TypeName,
    /// Time prompts of N tokens (0: none)
    ///
    /// May be given several times, or several numbers with commas between.
    #[arg(help_heading = heading::TESTS, short = 'p', long, value_name = "N", default_value = "512", value_delimiter = ',', value_parser = whole::<usize>(0..=u64::MAX))]
    n_prompt: Vec<usize>,
    /// Time generating N tokens (0: none)
    ///
    /// May be given several times, or several numbers with commas between.
    #[arg(help_heading = heading::TESTS, short = 'n', long, value_name = "N", default_value = "128", value_delimiter = ',', value_parser = whole::<usize>(0..=u64::MAX))]
    n_gen: Vec<usize>,
    /// Tokens that are in the cache before
    ///
    /// May be given several times, or several numbers with commas between.
    #[arg(help_heading = heading::TESTS, short = 'd', long, value_name = "N", default_value = "0", value_delimiter = ',', value_parser = whole::<usize>(0..=u64::MAX))]
    n_depth: Vec<usize>,
    /// Time generating for N texts side by side
    ///
    /// The tokens of all texts are counted together. May be given several times, or several numbers with commas between.
    #[arg(help_heading = heading::TESTS, long, value_name = "N", default_value = "1", value_delimiter = ',', value_parser = whole::<u16>(1..=1024))]
    parallel: Vec<u16>,
    /// Repetitions; every test runs once in each
    ///
    /// So that noise hits all alike.
    #[arg(help_heading = heading::TESTS, short, long, value_name = "N", default_value_t = 5, value_parser = whole::<u32>(1..=u32::MAX.into()))]
    repetitions: u32,
    /// Run this llama-bench on the same files, and tell the ratios
    ///
    /// In the same run, its repetitions between ours; its cache is in f16.
    #[arg(help_heading = heading::TESTS, long, value_name = "PATH")]
    vs: Option<PathBuf>,
    /// Also time the model pruned by this ratio; may be given several times
    ///
    /// The dense model always comes first.
    #[arg(help_heading = heading::AMOUNT, long, value_name = "RATIO", value_parser = parse_ratio)]
    prune: Vec<f64>,
    /// Also time the model without single weights, like wanda:0.5 or wanda:2:4; may be given several times
    ///
    /// By itself, and after every ratio of --prune.
    #[arg(help_heading = heading::AMOUNT, long, value_name = "METHOD:SHARE", value_parser = parse_sparsity)]
    sparse: Vec<Sparsity>,
    #[command(flatten)]
    method: WithAmount<MethodArgs>,
    /// Calibrate on N tokens of the built-in text before pruning; speed does not depend on it
    #[arg(help_heading = heading::CALIBRATION, long, value_name = "N", default_value_t = 1024, value_parser = whole::<usize>(1..=u32::MAX.into()), requires = AMOUNT)]
    calib_tokens: usize,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    overrides: OverrideArgs,
    #[command(flatten)]
    cache: CacheArgs,
    /// How to print the results
    #[arg(help_heading = heading::OUTPUT, short, long, value_name = "FORMAT", value_enum, default_value_t = Format::Md)]
    output: Format,
    /// The same as --output json
    #[arg(help_heading = heading::OUTPUT, long, conflicts_with = "output")]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Md,
    Csv,
    Json,
}

/// Sizes of random models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Size {
    /// The shape of Llama 3.2 1B
    #[value(name = "1b")]
    OneBillion,
    /// The shape of Llama 2 7B
    #[value(name = "7b")]
    SevenBillion,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(non_camel_case_types)] // as the type is called
enum TypeName {
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q8_0")]
    Q8_0,
}

/// With more tokens, bench would calibrate for days.
const MOST_CALIBRATION_TOKENS: usize = 1 << 24;

/// One test of one model: llama-bench's field names, and ours behind them.
#[derive(Debug, Clone, Serialize)]
struct Row {
    model_filename: String,
    n_threads: usize,
    n_prompt: usize,
    n_gen: usize,
    n_depth: usize,
    /// Texts side by side.
    n_parallel: usize,
    avg_ts: f64,
    stddev_ts: f64,
    samples_ts: Vec<f64>,
    median_ts: f64,
    /// The share of the layers' weights that was removed.
    prune_ratio: f64,
    /// How single weights were set to zero; `None` where none were.
    #[serde(skip_serializing_if = "Option::is_none")]
    sparse: Option<Sparsity>,
    isa: &'static str,
    /// Bytes of weights that generating a token reads.
    bytes_per_token: usize,
    /// Weights read per second in proportion to a plain read by the same threads in the same run; for generation only.
    #[serde(skip_serializing_if = "Option::is_none")]
    bandwidth_share: Option<f64>,
    /// Bytes of weights per second that were packed at load.
    #[serde(skip_serializing_if = "Option::is_none")]
    pack_rate: Option<f64>,
    /// The peer's median on the same file and test.
    #[serde(skip_serializing_if = "Option::is_none")]
    peer_ts: Option<f64>,
    /// Our median in proportion to the peer's.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio_to_peer: Option<f64>,
}

/// A model in one state, with the bandwidth samples of its bytes.
struct Subject {
    engine: Engine,
    /// Where a random model lies as a file, for the peer.
    file: Option<TemporaryFile>,
    prune_ratio: f64,
    sparse: Option<Sparsity>,
    bandwidth: Vec<f64>,
}

/// How a model is pruned before it is timed.
#[derive(Debug, Clone, Copy)]
struct Point {
    ratio: f64,
    sparse: Option<Sparsity>,
}

impl Point {
    fn is_dense(self) -> bool {
        self.ratio == 0.0 && self.sparse.is_none()
    }
}

impl Subject {
    fn is_dense(&self) -> bool {
        self.prune_ratio == 0.0 && self.sparse.is_none()
    }
}

pub fn run(mut args: BenchArgs) -> Result<()> {
    // Of a default of the user's and what is typed, which do not go together, the second counts.
    if args.vs.is_some() && args.cache.cache_type() != CacheType::F16 {
        if !args.given.has("cache_type") {
            args.cache = CacheArgs::default();
        } else if !args.given.has("vs") {
            args.vs = None;
        }
    }
    let tests = args.tests();
    args.check(&tests)?;
    let mut subjects = args.subjects()?;
    let peer = args.vs.as_deref().map(Peer::find).transpose()?;

    let mut samples = vec![vec![Vec::new(); tests.len()]; subjects.len()];
    let mut peer_samples = vec![vec![Vec::new(); tests.len()]; subjects.len()];
    interrupt::check()?;
    let watch = Watch::begin();
    let mut work = Work::begin("measuring", Unit::Of("tests"));
    let (mut done, all) = (
        0,
        u64::from(args.repetitions) * (subjects.len() * tests.len()) as u64,
    );
    'measuring: for _ in 0..args.repetitions {
        for (s, subject) in subjects.iter_mut().enumerate() {
            for (t, test) in tests.iter().enumerate() {
                work.at(done, all);
                if watch.flow().is_break() {
                    break 'measuring;
                }
                samples[s][t].push(subject.engine.speed(*test)?);
                // The peer's program has no texts side by side.
                if let (Some(peer), true, 1) = (&peer, subject.is_dense(), test.parallel) {
                    let model = subject.engine.report();
                    let path = subject.file.as_ref().map_or(&*model.path, |f| &**f);
                    match peer.sample(path, model.threads, *test) {
                        Ok(sample) => peer_samples[s][t].push(sample),
                        // The peer gets Ctrl-C as well.
                        Err(_) if watch.flow().is_break() => break 'measuring,
                        Err(error) => return Err(error),
                    }
                }
                done += 1;
            }
            let bandwidth = subject.engine.read_bandwidth();
            subject.bandwidth.push(bandwidth);
        }
    }
    drop(work);
    if watch.flow().is_break() {
        words::say("interrupted; this is what was measured before");
    }

    let mut rows = Vec::new();
    for (s, subject) in subjects.iter().enumerate() {
        for (t, test) in tests.iter().enumerate() {
            if samples[s][t].is_empty() {
                continue;
            }
            rows.push(Row::new(
                subject,
                *test,
                &samples[s][t],
                &peer_samples[s][t],
            ));
        }
    }
    streams::print(
        |out| match if args.json { Format::Json } else { args.output } {
            Format::Md => print_markdown(out, &rows, peer.is_some()),
            Format::Csv => print_csv(out, &rows),
            Format::Json => out.pretty_json(&rows),
        },
    )?;
    Ok(watch.end()?)
}

impl BenchArgs {
    /// Refuses what would be left undone in silence.
    fn check(&self, tests: &[SpeedTest]) -> Result<(), WrongUse> {
        if tests.is_empty() {
            return Err(WrongUse::new(
                "there is nothing to time: give -p or -n a number above 0",
            ));
        }
        if self.given.has("parallel")
            && self.parallel != [1]
            && tests.iter().all(|t| t.generate == 0)
        {
            return Err(WrongUse::new(
                "--parallel is about generating, and -n 0 leaves that out",
            ));
        }
        if self.vs.is_some() && self.cache.cache_type() != CacheType::F16 {
            return Err(WrongUse::new(
                "--vs compares with a peer whose cache is in f16; leave --kv out",
            ));
        }
        if self.calib_tokens > MOST_CALIBRATION_TOKENS {
            return Err(WrongUse::new(format!(
                "--calib-tokens {} is beyond the {MOST_CALIBRATION_TOKENS} that bench takes; speed does not depend on it",
                self.calib_tokens
            )));
        }
        Ok(())
    }

    fn tests(&self) -> Vec<SpeedTest> {
        let mut tests = Vec::new();
        for &depth in &self.n_depth {
            let prompts = self.n_prompt.iter().map(|&prompt| SpeedTest {
                prompt,
                generate: 0,
                depth,
                parallel: 1,
                cache_type: self.cache.cache_type(),
            });
            let counts = self.n_gen.iter().flat_map(|&generate| {
                let parallel = self.parallel.iter();
                parallel.map(move |&parallel| (generate, usize::from(parallel)))
            });
            let generations = counts.map(|(generate, parallel)| SpeedTest {
                prompt: 0,
                generate,
                depth,
                parallel,
                cache_type: self.cache.cache_type(),
            });
            tests.extend(
                prompts
                    .chain(generations)
                    .filter(|t| t.prompt + t.generate > 0),
            );
        }
        tests
    }

    fn subjects(&self) -> Result<Vec<Subject>> {
        let ratios: Vec<f64> = std::iter::once(0.0)
            .chain(self.prune.iter().copied().filter(|r| *r > 0.0))
            .collect();
        let sparse = || std::iter::once(None).chain(self.sparse.iter().copied().map(Some));
        let with = |sparse| ratios.iter().map(move |&ratio| Point { ratio, sparse });
        let points: Vec<Point> = sparse().flat_map(with).collect();
        let mut subjects = Vec::new();
        let hub = self.hf.iter().map(|name| of_hub(name));
        let models: Vec<PathBuf> = self.model.iter().cloned().chain(hub).collect();
        let no_model = models.is_empty() && self.synthetic.is_empty();
        for model in no_model
            .then_some(None)
            .into_iter()
            .chain(models.into_iter().map(Some))
        {
            for &point in &points {
                subjects.push(self.stored(model.clone(), point)?);
            }
        }
        for &size in &self.synthetic {
            for &point in &points {
                subjects.push(self.synthetic(size, point)?);
            }
        }
        Ok(subjects)
    }

    fn stored(&self, model: Option<PathBuf>, point: Point) -> Result<Subject> {
        let model = ModelArgs {
            model,
            hf: None,
            machine: self.machine.clone(),
            overrides: self.overrides.clone(),
        };
        let mut engine = model.open()?;
        let prune_ratio = self.prune(
            &mut engine,
            point,
            self.method.0.options(),
            TextSource::BuiltIn,
        )?;
        Ok(Subject {
            engine,
            file: None,
            prune_ratio,
            sparse: point.sparse,
            bandwidth: Vec::new(),
        })
    }

    fn synthetic(&self, size: Size, point: Point) -> Result<Subject> {
        let shape = match size {
            Size::OneBillion => Shape::LLAMA_1B,
            Size::SevenBillion => Shape::LLAMA_7B,
        };
        let synthetic_type = match self.synthetic_type {
            TypeName::Q4_0 => SyntheticType::Q4_0,
            TypeName::Q8_0 => SyntheticType::Q8_0,
        };
        let options = OpenOptions {
            pack: Pack::Never,
            ..self.machine.options()
        };
        let mut engine = Engine::synthetic(shape, synthetic_type, options)?;
        words::log(engine.notices());
        // Before packing, which rearranges the bytes.
        let file = (self.vs.is_some() && point.is_dense())
            .then(|| engine.image_file())
            .transpose()
            .context("the random model cannot be written to a file for the peer")?;
        if !self.machine.no_pack {
            engine.pack();
        }
        let vocabulary = shape.vocabulary as u32;
        let tokens = 0..self.calib_tokens as u32;
        let tokens = tokens.map(|i| i.wrapping_mul(7919) % vocabulary).collect();
        let method = MethodOptions {
            // Nothing is to be restored of random weights.
            restore: Some(Restore::Bias),
            ..self.method.0.options()
        };
        let prune_ratio = self.prune(&mut engine, point, method, TextSource::Tokens(tokens))?;
        Ok(Subject {
            engine,
            file,
            prune_ratio,
            sparse: point.sparse,
            bandwidth: Vec::new(),
        })
    }

    /// Prunes as a point says; the share of the layers' weights that is gone.
    fn prune(
        &self,
        engine: &mut Engine,
        point: Point,
        method: MethodOptions,
        source: TextSource,
    ) -> Result<f64> {
        if point.is_dense() {
            return Ok(0.0);
        }
        let options = PruneOptions {
            target: Target::Ratio(point.ratio),
            method,
            sparse: point.sparse.map(Into::into),
            calibration: CalibrationOptions {
                source,
                tokens: Some(self.calib_tokens),
                ..CalibrationOptions::default()
            },
            cache: Cache::Profiles,
            ..PruneOptions::default()
        };
        let prepared = engine.prepare(&options)?;
        words::log(prepared.notices());
        let pruned = engine.prune_prepared(prepared, &mut progress::bars())?;
        words::log(&pruned.notices);
        Ok(pruned.removed)
    }
}

impl Row {
    fn new(subject: &Subject, test: SpeedTest, samples: &[f64], peer: &[f64]) -> Self {
        let (avg_ts, stddev_ts) = mean_and_deviation(samples);
        let median_ts = median(samples);
        let model = subject.engine.report();
        let bytes_per_token = subject.engine.model().bytes_per_token();
        let peer_ts = (!peer.is_empty()).then(|| median(peer));
        Self {
            model_filename: model.path.display().to_string(),
            n_threads: model.threads,
            n_prompt: test.prompt,
            n_gen: test.generate,
            n_depth: test.depth,
            n_parallel: test.parallel,
            avg_ts,
            stddev_ts,
            samples_ts: samples.to_vec(),
            median_ts,
            prune_ratio: subject.prune_ratio,
            sparse: subject.sparse,
            isa: model.isa,
            bytes_per_token,
            bandwidth_share: (test.generate > 0).then(|| {
                let passes = median_ts / test.parallel as f64;
                passes * bytes_per_token as f64 / median(&subject.bandwidth)
            }),
            pack_rate: model
                .pack_time
                .filter(|_| subject.is_dense())
                .map(|time| model.bytes as f64 / time.as_secs_f64()),
            peer_ts,
            ratio_to_peer: peer_ts.map(|peer| median_ts / peer),
        }
    }

    /// As llama-bench names its tests: pp512, tg128, tg128 @ d4096; tg128 x8 for eight texts side by side.
    fn test_name(&self) -> String {
        let name = match self.n_gen {
            0 => format!("pp{}", self.n_prompt),
            n => format!("tg{n}"),
        };
        let name = match self.n_parallel {
            1 => name,
            n => format!("{name} x{n}"),
        };
        match self.n_depth {
            0 => name,
            depth => format!("{name} @ d{depth}"),
        }
    }

    fn file_name(&self) -> String {
        hub::name_of_file(Path::new(&self.model_filename))
    }
}

fn print_markdown(out: &mut impl Write, rows: &[Row], with_peer: bool) -> io::Result<()> {
    write!(
        out,
        "| model | isa | threads | pruned | test | tokens/s | ± | MB/token | bandwidth |"
    )?;
    writeln!(
        out,
        "{}",
        if with_peer {
            " llama.cpp | ratio |"
        } else {
            ""
        }
    )?;
    write!(
        out,
        "| --- | --- | --: | --: | --- | --: | --: | --: | --: |"
    )?;
    writeln!(out, "{}", if with_peer { " --: | --: |" } else { "" })?;
    for row in rows {
        write!(
            out,
            "| {} | {} | {} | {:.1} %{} | {} | {:.1} | {:.1} | {:.1} | {} |",
            row.file_name(),
            row.isa,
            row.n_threads,
            row.prune_ratio * 100.0,
            row.sparse.map_or(String::new(), |s| format!(", {s}")),
            row.test_name(),
            row.median_ts,
            row.stddev_ts,
            row.bytes_per_token as f64 / 1e6,
            row.bandwidth_share
                .map_or(String::new(), |share| format!("{:.0} %", share * 100.0)),
        )?;
        match (with_peer, row.peer_ts, row.ratio_to_peer) {
            (true, Some(peer), Some(ratio)) => writeln!(out, " {peer:.1} | {ratio:.2} |")?,
            (true, ..) => writeln!(out, "  |  |")?,
            (false, ..) => writeln!(out)?,
        }
    }
    Ok(())
}

fn print_csv(out: &mut impl Write, rows: &[Row]) -> io::Result<()> {
    writeln!(
        out,
        "model_filename,isa,n_threads,prune_ratio,n_prompt,n_gen,n_depth,n_parallel,median_ts,avg_ts,stddev_ts,bytes_per_token,bandwidth_share,peer_ts,ratio_to_peer,sparse"
    )?;
    let optional = |value: Option<f64>| value.map_or(String::new(), |v| v.to_string());
    for row in rows {
        writeln!(
            out,
            "\"{}\",{},{},{},{},{},{},{},{},{},{},{},{},{},{},{}",
            row.model_filename.replace('"', "\"\""),
            row.isa,
            row.n_threads,
            row.prune_ratio,
            row.n_prompt,
            row.n_gen,
            row.n_depth,
            row.n_parallel,
            row.median_ts,
            row.avg_ts,
            row.stddev_ts,
            row.bytes_per_token,
            optional(row.bandwidth_share),
            optional(row.peer_ts),
            optional(row.ratio_to_peer),
            row.sparse.map_or(String::new(), |s| s.to_string()),
        )?;
    }
    Ok(())
}

/// llama.cpp's own benchmark.
struct Peer {
    program: PathBuf,
}

/// What we read of its output.
#[derive(Debug, Deserialize)]
struct PeerRow {
    avg_ts: f64,
}

impl Peer {
    fn find(program: &Path) -> Result<Self> {
        ensure!(
            program.is_file(),
            "the peer {} is not there; --vs takes the path of a llama-bench",
            program.display()
        );
        Ok(Self {
            program: program.to_owned(),
        })
    }

    /// Tokens per second of one repetition, which the peer itself precedes by a warm-up.
    fn sample(&self, model: &Path, threads: usize, test: SpeedTest) -> Result<f64> {
        let output = Command::new(&self.program)
            .arg("-m")
            .arg(model)
            .args(["-o", "json", "-r", "1"])
            .args(["-t", &threads.to_string()])
            .args(["-p", &test.prompt.to_string()])
            .args(["-n", &test.generate.to_string()])
            .args(["-d", &test.depth.to_string()])
            .output()
            .with_context(|| format!("the peer {} cannot be started", self.program.display()))?;
        ensure!(
            output.status.success(),
            "the peer failed on {}: {}",
            model.display(),
            String::from_utf8_lossy(&output.stderr)
                .lines()
                .last()
                .unwrap_or("no message")
        );
        let rows: Vec<PeerRow> = serde_json::from_slice(&output.stdout)
            .context("the peer's output is not what llama-bench prints")?;
        let row = rows.first().context("the peer printed no result")?;
        Ok(row.avg_ts)
    }
}
