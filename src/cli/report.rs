//! What `run` says at the end, on standard error.

use std::fmt::Write as _;
use std::time::Duration;

use flapjack::generate::{Generated, Timings};
use flapjack::prune::StoredProfile;
use flapjack::quant::BlockType;

use super::calibration::{Calibrated, Task};
use super::effect::Effect;
use super::options::Loaded;
use super::pruning::{Pruned, Search, Snapshot};

/// Everything that the report tells.
pub struct Run {
    title: String,
    map_time: Duration,
    pack_time: Option<Duration>,
    pub calibrated: Option<CalibrationNote>,
    /// The dense model's speed on the same prompt, where the model was pruned.
    pub dense: Option<Timings>,
    pub pruned: Option<Pruned>,
}

/// What calibration took.
pub struct CalibrationNote {
    source: String,
    tokens: usize,
    time: Duration,
    profile: ProfileFrom,
    /// Tokens of loss curves, and the time they took, if they were measured now.
    curves: Option<(usize, Duration)>,
    /// Groups of layers that covariances were collected in, where not all of them fit in memory.
    groups: Option<usize>,
}

#[derive(PartialEq)]
enum ProfileFrom {
    Now,
    Kept,
    /// There is one, and it was not needed.
    Unread,
}

impl CalibrationNote {
    pub fn new(calibrated: &Calibrated) -> Self {
        let StoredProfile { origin, profile } = &calibrated.stored;
        let held_back = profile.curves.as_ref().map_or(0, |curves| curves.tokens);
        Self {
            source: origin.source.clone(),
            tokens: origin
                .tokens
                .saturating_sub(held_back + calibrated.judge.len()),
            time: calibrated.time,
            profile: match calibrated.kept {
                true => ProfileFrom::Kept,
                false => ProfileFrom::Now,
            },
            curves: calibrated.curves_time.map(|time| (held_back, time)),
            groups: calibrated.groups.as_ref().map(|g| g.ranges().len()),
        }
    }

    pub fn unread(task: &Task) -> Self {
        Self {
            source: task.origin().source.clone(),
            tokens: task.seen(),
            time: task.time(),
            profile: ProfileFrom::Unread,
            curves: None,
            groups: None,
        }
    }
}

impl CalibrationNote {
    pub fn lines(&self) -> Vec<String> {
        let how = match self.profile {
            ProfileFrom::Kept => "from a profile".to_owned(),
            ProfileFrom::Unread => "not again".to_owned(),
            ProfileFrom::Now => format!(
                "{:.0} tokens/s",
                self.tokens as f64 / self.time.as_secs_f64().max(1e-9)
            ),
        };
        let mut lines = vec![format!(
            "  calibrate  {}  {} tokens of {}, {how}",
            seconds(self.time),
            self.tokens,
            self.source
        )];
        lines.extend(self.curves.map(|(tokens, time)| {
            format!(
                "  curves     {}  what each module is worth, on {tokens} tokens held back",
                seconds(time)
            )
        }));
        lines.extend(self.groups.map(|groups| {
            format!(
                "  memory     covariances in {} of layers, not all at once",
                plural(groups, "group")
            )
        }));
        lines
    }
}

impl Run {
    pub fn new(loaded: &Loaded) -> Self {
        let name = loaded.model.path().file_name().unwrap_or_default();
        Self {
            title: format!(
                "{}: {} layers, {} parameters, {}; {} with {}",
                name.to_string_lossy(),
                loaded.model.layers.len(),
                millions(loaded.model.parameters()),
                mebibytes(loaded.model.bytes() as u64),
                loaded.runtime.kernels.isa().name(),
                plural(loaded.runtime.pool.threads(), "thread"),
            ),
            map_time: loaded.load_time,
            pack_time: loaded.pack_time,
            calibrated: None,
            dense: None,
            pruned: None,
        }
    }

    pub fn print(&self, outcome: &Generated) {
        eprint!("\n{}", self.text(outcome));
    }

    fn text(&self, outcome: &Generated) -> String {
        let mut lines = vec![self.title.clone()];
        lines.push(format!("  map        {}", seconds(self.map_time)));
        if let Some(time) = self.pack_time {
            lines.push(format!("  pack       {}", seconds(time)));
        }
        if let Some(note) = &self.calibrated {
            lines.extend(note.lines());
        }
        if let Some(pruned) = &self.pruned {
            lines.extend(pruned_lines(pruned));
        }
        lines.extend(self.speed_lines(outcome));
        lines.into_iter().fold(String::new(), |mut text, line| {
            let _ = writeln!(text, "{line}");
            text
        })
    }

    fn speed_lines(&self, outcome: &Generated) -> Vec<String> {
        let timings = &outcome.timings;
        let dense = self.dense.as_ref();
        let mut lines = vec![speed_line(
            "prompt",
            &plural(timings.prompt_tokens, "token"),
            Some(timings.prompt_speed()),
            dense.map(Timings::prompt_speed),
        )];
        lines.push(speed_line(
            "generate",
            &plural(outcome.tokens.len(), "token"),
            timings.generation_speed(),
            dense.and_then(Timings::generation_speed),
        ));
        lines
    }
}

/// Ratio, widths, sizes and memory, before and after.
pub fn pruned_lines(pruned: &Pruned) -> Vec<String> {
    let Pruned {
        ratio,
        recipe,
        plan,
        before,
        after,
        time,
        repeated,
        found,
        effects,
    } = pruned;
    let change = |name: &str, was: String, is: String, part: f64| {
        format!(
            "  {name:<10} {was} -> {is}  ({:+.1} %)",
            (part - 1.0) * 100.0
        )
    };
    let mut lines = Vec::new();
    if let Some(Search {
        what,
        time,
        speedup,
    }) = found
    {
        lines.push(format!("  find       {}  {what}", seconds(*time)));
        lines.extend(
            speedup.map(|factor| format!("  reached    {factor:.2} times the speed, measured")),
        );
    }
    lines.push(format!(
        "  prune      {}  asked {:.1} %, removed {:.1} % of the layers' weights{}",
        seconds(*time),
        ratio * 100.0,
        plan.ratio() * 100.0,
        match repeated {
            true => ", as in an earlier run (from the cache)",
            false => "",
        }
    ));
    lines.push(format!(
        "  by         {}, {}, heads by {}, restoration {}",
        recipe.metric, recipe.structure, recipe.heads, recipe.restore
    ));
    for (name, column) in [("heads", 0), ("KV heads", 1), ("channels", 2)] {
        lines.push(kept_line(
            name,
            before.widths.iter().map(|w| w[column]),
            after.widths.iter().map(|w| w[column]),
        ));
    }
    for (name, place) in [("attention output", 0), ("MLP down", 1)] {
        let of = |snapshot: &Snapshot| snapshot.types.iter().map(|t| t[place]).collect();
        lines.extend(types_line(name, of(before), of(after)));
    }
    lines.push(change(
        "parameters",
        millions(before.parameters),
        millions(after.parameters),
        after.parameters as f64 / before.parameters as f64,
    ));
    lines.push(change(
        "weights",
        mebibytes(before.bytes as u64),
        mebibytes(after.bytes as u64),
        after.bytes as f64 / before.bytes as f64,
    ));
    lines.extend(effects.iter().map(|effect| {
        let Effect {
            text,
            tokens,
            before,
            after,
        } = effect;
        let line = change(
            "perplexity",
            format!("{before:.2}"),
            format!("{after:.2}"),
            after / before,
        );
        format!("{line}  on {} of {text}", plural(*tokens, "token"))
    }));
    if let (Some(was), Some(is)) = (before.map, after.map) {
        lines.push(format!(
            "  map        resident {} -> {}, of it private {} -> {}",
            mebibytes(was.resident),
            mebibytes(is.resident),
            mebibytes(was.private),
            mebibytes(is.private)
        ));
    }
    if let (Some(was), Some(is)) = (before.process, after.process) {
        lines.push(change(
            "process",
            format!("resident {}", mebibytes(was)),
            mebibytes(is),
            is as f64 / was as f64,
        ));
    }
    lines
}

/// Layer by layer what is left of what, in runs of equal numbers: "9 of 9 ×3, 7, 8 ×2".
fn kept_line(
    name: &str,
    before: impl Iterator<Item = usize>,
    after: impl Iterator<Item = usize>,
) -> String {
    let before: Vec<usize> = before.collect();
    let after: Vec<usize> = after.collect();
    let (was, is): (usize, usize) = (before.iter().sum(), after.iter().sum());
    let runs: Vec<String> = after
        .chunk_by(|a, b| a == b)
        .map(|run| match run.len() {
            1 => run[0].to_string(),
            n => format!("{}×{n}", run[0]),
        })
        .collect();
    format!("  {name:<10} {is} of {was}, by layer: {}", runs.join(" "))
}

/// In how many layers a tensor has changed from which type to which, if it has in any.
fn types_line(name: &str, before: Vec<BlockType>, after: Vec<BlockType>) -> Option<String> {
    let mut changes: Vec<((BlockType, BlockType), usize)> = Vec::new();
    for change in before.into_iter().zip(after).filter(|(was, is)| was != is) {
        match changes.iter_mut().find(|(other, _)| *other == change) {
            Some((_, count)) => *count += 1,
            None => changes.push((change, 1)),
        }
    }
    let changes: Vec<String> = changes
        .into_iter()
        .map(|((was, is), count)| format!("{} -> {} ×{count}", was.name(), is.name()))
        .collect();
    (!changes.is_empty()).then(|| format!("  types      {name} {}", changes.join(", ")))
}

fn speed_line(name: &str, amount: &str, speed: Option<f64>, dense: Option<f64>) -> String {
    let mut line = format!("  {name:<10} {amount}");
    match (speed, dense) {
        (Some(speed), Some(dense)) => {
            let _ = write!(
                line,
                ", {speed:.1} tokens/s; dense {dense:.1} tokens/s, ratio {:.2}",
                speed / dense
            );
        }
        (Some(speed), None) => {
            let _ = write!(line, ", {speed:.1} tokens/s");
        }
        // Nothing was generated behind the first token, so there is no speed.
        (None, _) => {}
    }
    line
}

pub fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

pub fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

fn millions(count: usize) -> String {
    format!("{:.1} M", count as f64 / 1e6)
}

pub fn megabytes(bytes: usize) -> String {
    format!("{:.2} MB", bytes as f64 / 1e6)
}

pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_widths_are_told_in_runs() {
        let line = kept_line("heads", [9, 9, 9, 9].into_iter(), [9, 9, 7, 8].into_iter());
        assert_eq!(line, "  heads      33 of 36, by layer: 9×2 7 8");
    }

    #[test]
    fn changes_of_type_are_counted() {
        use BlockType::{Q4_1, Q4_K, Q6_K, Q8_0};
        assert_eq!(types_line("MLP down", vec![Q4_K; 3], vec![Q4_K; 3]), None);
        let line = types_line(
            "MLP down",
            vec![Q6_K, Q4_K, Q4_K, Q6_K, Q4_K],
            vec![Q8_0, Q4_1, Q4_K, Q6_K, Q4_1],
        );
        let expected = "  types      MLP down Q6_K -> Q8_0 ×1, Q4_K -> Q4_1 ×2";
        assert_eq!(line.as_deref(), Some(expected));
    }

    #[test]
    fn a_speed_is_told_with_its_ratio_to_dense_where_there_is_one() {
        assert_eq!(
            speed_line("generate", "3 tokens", Some(30.0), Some(20.0)),
            "  generate   3 tokens, 30.0 tokens/s; dense 20.0 tokens/s, ratio 1.50"
        );
        assert_eq!(
            speed_line("generate", "1 token", None, Some(20.0)),
            "  generate   1 token"
        );
    }
}
