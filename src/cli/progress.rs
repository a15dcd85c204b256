//! How far long work is: a bar on a terminal, a line now and then elsewhere, nothing with -q. All of it on standard error.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;
use flapjack::engine::{self, Event, Stage};
use flapjack::hub;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::interrupt::Watch;
use super::streams;
pub use super::streams::set_quiet;
use super::words::{log, megabytes, printable, seconds};

/// Without a terminal: what takes less than this is not worth a line, and how long to wait before the next one.
const FIRST_LINE: Duration = Duration::from_secs(1);
const NEXT_LINE: Duration = Duration::from_secs(15);
/// How often a bar moves by itself.
const TICK: Duration = Duration::from_millis(100);

/// The bars that are drawn, one below the other.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);
/// How many they are.
static DRAWN: AtomicUsize = AtomicUsize::new(0);

/// Writes lines above the bars that are drawn; says whether there are any.
pub fn above_bars(lines: &str) -> bool {
    let are_there = DRAWN.load(Ordering::Relaxed) > 0;
    if are_there {
        // As everything on standard error: where it cannot be written, it is let go.
        let _ = BARS.println(lines);
    }
    are_there
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    /// Things of this name, in the plural.
    Of(&'static str),
}

/// Long work, shown for as long as this lives.
pub struct Work(Shown);

enum Shown {
    Nowhere,
    Drawn(Drawn),
    Told(Told),
}

impl Work {
    pub fn begin(title: impl Into<String>, unit: Unit) -> Self {
        let title = title.into();
        Self(match (streams::is_quiet(), streams::is_drawn()) {
            (true, _) => Shown::Nowhere,
            (false, true) => Shown::Drawn(Drawn::begin(title, unit)),
            (false, false) => Told::begin(title, unit).map_or(Shown::Nowhere, Shown::Told),
        })
    }

    /// So much is done of so much in all; 0 where nobody knows that.
    pub fn at(&mut self, done: u64, total: u64) {
        match &mut self.0 {
            Shown::Nowhere => {}
            Shown::Drawn(drawn) => drawn.at(done, total),
            // Who listens there lives longer than this.
            Shown::Told(told) => drop(told.to.as_ref().map(|to| to.send((done, total)))),
        }
    }
}

// ---- on a terminal ----

/// A bar, or a sign of life where the total is not known.
struct Drawn {
    bar: ProgressBar,
    unit: Unit,
    template: &'static str,
    /// Whether it was told how far the work is.
    has_begun: bool,
}

impl Drawn {
    fn begin(title: String, unit: Unit) -> Self {
        // Drawn only when it has its looks.
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let mut drawn = Self {
            bar: bar.with_message(title),
            unit,
            template: "",
            // The call below only draws it; the first report of the work is another.
            has_begun: true,
        };
        drawn.at(0, 0);
        drawn.has_begun = false;
        drawn.bar = BARS.add(drawn.bar.clone());
        drawn.bar.enable_steady_tick(TICK);
        DRAWN.fetch_add(1, Ordering::Relaxed);
        drawn
    }

    fn at(&mut self, done: u64, total: u64) {
        let template = match (self.unit, total, done) {
            (_, 0, 0) => "{spinner} {msg}, {elapsed}",
            (Unit::Bytes, 0, _) => {
                "{spinner} {msg}: {decimal_bytes}, {decimal_bytes_per_sec}, {elapsed}"
            }
            (Unit::Of(_), 0, _) => "{spinner} {msg}: {pos} {prefix}, {elapsed}",
            // Before anything is done, nobody knows how long it takes.
            (Unit::Bytes, _, 0) => "{msg} [{wide_bar}] {decimal_bytes}/{decimal_total_bytes}",
            (Unit::Of(_), _, 0) => "{msg} [{wide_bar}] {pos}/{len} {prefix}",
            (Unit::Bytes, ..) => {
                "{msg} [{wide_bar}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta} left"
            }
            (Unit::Of(_), ..) => "{msg} [{wide_bar}] {pos}/{len} {prefix} {eta} left",
        };
        if self.template != template {
            self.template = template;
            let style = ProgressStyle::with_template(template);
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            self.bar.set_style(style.progress_chars("=> "));
            if let Unit::Of(things) = self.unit {
                self.bar.set_prefix(things);
            }
        }
        match total {
            0 => self.bar.unset_length(),
            _ => self.bar.set_length(total),
        }
        if self.has_begun {
            self.bar.set_position(done);
            return;
        }
        self.has_begun = true;
        // What an earlier run had done is not this one's speed. Only a bar that does not move by itself takes a position down at once.
        self.bar.disable_steady_tick();
        self.bar.set_position(done);
        self.bar.reset_eta();
        self.bar.enable_steady_tick(TICK);
    }
}

impl Drop for Drawn {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        BARS.remove(&self.bar);
        DRAWN.fetch_sub(1, Ordering::Relaxed);
    }
}

// ---- elsewhere ----

/// A thread that says now and then how far the work is, also where nothing is heard from it for long.
struct Told {
    to: Option<Sender<(u64, u64)>>,
    teller: Option<JoinHandle<()>>,
}

impl Told {
    /// `None` where there is no thread to be had, which is no reason not to do the work.
    fn begin(title: String, unit: Unit) -> Option<Self> {
        let (to, from) = mpsc::channel();
        let tell = move || tell(&title, unit, &from);
        let teller = std::thread::Builder::new().spawn(tell).ok()?;
        Some(Self {
            to: Some(to),
            teller: Some(teller),
        })
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        // Without a sender the teller comes to its end, and says its last line before anything else is said.
        self.to = None;
        if let Some(teller) = self.teller.take() {
            let _ = teller.join();
        }
    }
}

fn tell(title: &str, unit: Unit, from: &Receiver<(u64, u64)>) {
    let begun = Instant::now();
    let (mut done, mut total) = (0, 0);
    // What an earlier run had done already.
    let mut before = None;
    let mut next = FIRST_LINE;
    let mut was_told = false;
    loop {
        match from.recv_timeout(next.saturating_sub(begun.elapsed())) {
            Ok(now) => {
                (done, total) = now;
                before.get_or_insert(done);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        let elapsed = begun.elapsed();
        if elapsed >= next {
            let here = (before.unwrap_or(0), elapsed);
            streams::say(&progress_line(title, unit, done, total, here));
            was_told = true;
            next = elapsed + NEXT_LINE;
        }
    }
    if was_told {
        let so_far = so_far(unit, done, total);
        streams::say(&format!("{title}: {so_far}{}", seconds(begun.elapsed())));
    }
}

/// `before` was done when this run began, which has taken `elapsed`.
fn progress_line(
    title: &str,
    unit: Unit,
    done: u64,
    total: u64,
    (before, elapsed): (u64, Duration),
) -> String {
    let mut line = format!("{title}: {}", so_far(unit, done, total));
    let here = done.saturating_sub(before) as f64;
    if unit == Unit::Bytes && here > 0.0 {
        let speed = here / elapsed.as_secs_f64();
        line += &format!("{}/s, ", megabytes(speed as usize));
    }
    if done < total && here > 0.0 {
        let left = elapsed.as_secs_f64() * (total - done) as f64 / here;
        line += &format!("about {left:.0} s left");
    }
    let line = line.trim_end_matches([',', ' ', ':']);
    format!("{line} ...")
}

/// "512 of 1024 tokens, ", or nothing where nothing is known.
fn so_far(unit: Unit, done: u64, total: u64) -> String {
    let amount = |count: u64| match unit {
        Unit::Bytes => megabytes(count as usize),
        Unit::Of(_) => count.to_string(),
    };
    let things = match unit {
        Unit::Bytes => String::new(),
        // "1 of 1 token", and "1 token".
        Unit::Of(things) => match if total == 0 { done } else { total } {
            1 => format!(" {}", things.trim_end_matches('s')),
            _ => format!(" {things}"),
        },
    };
    match (done, total) {
        (0, 0) => String::new(),
        (_, 0) => format!("{}{things}, ", amount(done)),
        _ => format!("{} of {}{things}, ", amount(done), amount(total)),
    }
}

// ---- the engine's work ----

/// Shows each stage of what the engine does, and calls it off on a signal.
pub fn bars() -> impl FnMut(Event) -> ControlFlow<()> + Send {
    bars_of(None)
}

/// The same for a model of this name, which may be fetched; without one it is the default model.
pub fn bars_of(model: Option<&Path>) -> impl FnMut(Event) -> ControlFlow<()> + Send {
    let model = short_name(model);
    let watch = Watch::begin();
    let mut shown: Vec<(Stage, Work)> = Vec::new();
    move |Event { stage, done, total }| {
        // Covariances are collected in the middle of other stages; else one ends where the next begins.
        if stage != Stage::Covariances {
            shown.retain(|(other, _)| *other == stage);
        }
        if !shown.iter().any(|(other, _)| *other == stage) {
            let (title, unit) = title(stage, &model);
            shown.push((stage, Work::begin(title, unit)));
        }
        for (_, work) in shown.iter_mut().filter(|(other, _)| *other == stage) {
            work.at(done, total);
        }
        if total > 0 && done >= total {
            shown.retain(|(other, _)| *other != stage);
        }
        watch.flow()
    }
}

/// A model's name, short enough for a line of 80 columns to have room for a bar.
fn short_name(model: Option<&Path>) -> String {
    let Some(model) = model else {
        // Without its type and extension.
        let model = hub::DEFAULT_MODEL.file_name;
        return model.split('.').next().unwrap_or(model).to_owned();
    };
    let name = model.to_string_lossy();
    let name = name.strip_prefix("hf:").unwrap_or(&name);
    let last = name.rsplit('/').next().unwrap_or(name);
    printable(last)
}

/// What is done in a stage, and what is counted; `model` is the one that is fetched.
fn title(stage: Stage, model: &str) -> (String, Unit) {
    let (title, unit) = match stage {
        Stage::Downloading => return (format!("downloading {model}"), Unit::Bytes),
        Stage::Waiting => {
            let title = format!("waiting for another process that fetches {model}");
            return (title, Unit::Bytes);
        }
        Stage::Unpacking => return (format!("unpacking {model}"), Unit::Bytes),
        Stage::Checking => return (format!("checking {model}"), Unit::Bytes),
        Stage::Writing => ("writing text to calibrate on", Unit::Of("tokens")),
        Stage::Calibrating => ("calibrating", Unit::Of("tokens")),
        Stage::Importance => ("measuring importance", Unit::Of("layers")),
        Stage::Covariances => ("collecting covariances", Unit::Of("tokens")),
        Stage::Curves => ("measuring loss curves", Unit::Of("modules")),
        Stage::Types => ("measuring smaller types", Unit::Of("places")),
        Stage::Retyping => ("encoding in smaller types", Unit::Of("places")),
        Stage::Searching => ("looking for the ratio", Unit::Of("models")),
        Stage::Plans => ("searching plans", Unit::Of("plans")),
        Stage::Pruning => ("pruning", Unit::Of("layers")),
        Stage::Sparsifying => ("removing single weights", Unit::Of("layers")),
        Stage::Healing => ("healing", Unit::Of("tokens")),
        Stage::Effects => ("measuring the effect", Unit::Of("chunks")),
        Stage::Comparing => ("timing against the dense model", Unit::Of("turns")),
        Stage::Scoring => ("scoring", Unit::Of("chunks")),
        Stage::Exporting => ("writing the model", Unit::Bytes),
    };
    (title.to_owned(), unit)
}

/// A model by its path or name, or the default model (`None`): where it is, after it was fetched if it was not there yet.
pub fn model(name: Option<&Path>) -> Result<PathBuf> {
    // They end with this: where nothing is watched, Ctrl-C ends the program at once.
    let mut bars = bars_of(name);
    let Some(name) = name else {
        return Ok(engine::default_model(&mut bars)?);
    };
    let (path, notices) = engine::find_model(name, &mut bars)?;
    drop(bars);
    log(&notices);
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_much_is_done_and_how_long_the_rest_takes() {
        let line = |unit, done, total| {
            let here = (0, Duration::from_secs(10));
            progress_line("calibrating", unit, done, total, here)
        };
        let tokens = Unit::Of("tokens");
        assert_eq!(line(tokens, 0, 0), "calibrating ...");
        assert_eq!(line(tokens, 0, 100), "calibrating: 0 of 100 tokens ...");
        let part = line(tokens, 25, 100);
        assert_eq!(part, "calibrating: 25 of 100 tokens, about 30 s left ...");
        assert_eq!(line(tokens, 3, 0), "calibrating: 3 tokens ...");
        assert_eq!(line(tokens, 0, 1), "calibrating: 0 of 1 token ...");
        let bytes = line(Unit::Bytes, 20_000_000, 80_000_000);
        assert_eq!(
            bytes,
            "calibrating: 20.00 MB of 80.00 MB, 2.00 MB/s, about 30 s left ..."
        );
        // Half of it was done by an earlier run.
        let resumed =
            |done| progress_line("healing", tokens, done, 100, (50, Duration::from_secs(10)));
        assert_eq!(resumed(50), "healing: 50 of 100 tokens ...");
        assert_eq!(
            resumed(60),
            "healing: 60 of 100 tokens, about 40 s left ..."
        );
    }
}
