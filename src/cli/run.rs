//! `flapjack run`

use std::io::{self, IsTerminal, Read};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use flapjack::chat::{AnswerParser, ChatOptions};
use flapjack::engine::{
    Engine, EngineError, GenerateOptions, Notice, PruneOptions, SequenceOptions, SpeedComparison,
};
use flapjack::generate::Generation;

use super::arguments::{
    AMOUNT, CacheArgs, Given, ModelArgs, PruningArgs, WrongUse, parse_count, read_text, whole,
};
use super::chat::{self, ChatArgs, ChatSetup, Printer};
use super::ending::Ending;
use super::interrupt::{self, Watch};
use super::progress::{Unit, Work};
use super::sampling::SamplingArgs;
use super::{heading, progress, report, words};

/// Tokens that are generated behind a prompt that is not answered.
const DEFAULT_TOKENS: usize = 128;
/// Reading a prompt of more tokens takes long enough to tell how far it is.
const LONG_PROMPT: usize = 256;

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    given: Given,
    #[command(flatten)]
    model: ModelArgs,
    /// The prompt
    #[arg(help_heading = heading::TEXT, short, long, value_name = "TEXT", conflicts_with = "file")]
    prompt: Option<String>,
    /// Read the prompt from a file [default: standard input]
    ///
    /// One newline at its end is dropped.
    #[arg(help_heading = heading::TEXT, short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    chat: ChatArgs,
    /// Go on with the prompt as it stands
    ///
    /// Without it, a model that has a chat template takes the prompt as a user's message, and answers it.
    #[arg(help_heading = heading::TEXT, long)]
    raw: bool,
    /// Take control tokens that the prompt spells as such
    #[arg(help_heading = heading::TEXT, long, requires = "raw")]
    special: bool,
    /// Generate at most N tokens (-1: no limit)
    ///
    /// By default 128, and no limit where the prompt is answered. In any case to where the model ends its text, or the context is full;
    /// -2 means the same as -1.
    #[arg(help_heading = heading::TEXT, short, long, visible_alias = "n-predict", alias = "predict", value_name = "N", value_parser = parse_count)]
    n: Option<usize>,
    /// Positions to make room for (0: the model's own context)
    ///
    /// By default as many as prompt and -n need, up to what the model was trained for.
    #[arg(help_heading = heading::TEXT, short, long, visible_alias = "ctx-size", value_name = "N", value_parser = whole::<usize>(0..=u64::MAX))]
    ctx: Option<usize>,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Stop where this text appears; may be given several times
    #[arg(help_heading = heading::TEXT, long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// Go on when the model ends its text
    #[arg(help_heading = heading::TEXT, long)]
    ignore_eos: bool,
    #[command(flatten)]
    pruning: PruningArgs,
    /// Do not measure what pruning gains and costs
    #[arg(help_heading = heading::OUTPUT, long, requires = AMOUNT)]
    no_baseline: bool,
    /// Print no report
    #[arg(help_heading = heading::OUTPUT, short, long)]
    quiet: bool,
}

pub fn run(mut args: RunArgs) -> Result<()> {
    progress::set_quiet(args.quiet);
    let prompt = args.prompt_text()?;
    // A default of the user's for prompts; a chat has none.
    args.raw &= prompt.is_some() || args.given.has("raw");
    let mut engine = args.model.open()?;
    args.chat.prepare(&mut engine)?;
    let answers = !args.raw && engine.shared_chat_template().is_some();
    let options = args.generate_options(&engine, answers)?;
    let Some(prompt) = prompt else {
        return args.talk(engine, options);
    };
    if prompt.trim().is_empty() {
        tracing::warn!("the prompt is empty: the model begins a text of its own");
    }
    let rendered = answers
        .then(|| {
            engine.chat_text(
                &args.chat.messages(&args.model, &prompt),
                &ChatOptions::default(),
            )
        })
        .transpose()?;
    let prompt = match &rendered {
        Some(rendered) => rendered
            .encode(engine.tokenizer()?)
            .map_err(EngineError::from)?,
        None if args.special => {
            let tokens = engine.tokenizer()?.encode_special(&prompt, None);
            tokens.map_err(EngineError::from)?
        }
        None => engine.prompt(&prompt)?,
    };
    let place = args.sequence_options(&engine, prompt.len(), options.max_tokens);

    words::log(engine.check_sequence(place)?.as_slice());

    let mut report = report::Run::new(&engine);
    report.answers = answers;
    if let Some(pruning) = args.pruning.options_if_any(!args.no_baseline)? {
        let prepared = engine.prepare(&pruning)?;
        words::log(prepared.notices());
        let pruned = engine.prune_prepared(prepared, &mut progress::bars())?;
        words::log(&pruned.notices);
        report.pruned = Some(pruned);
        interrupt::check()?;
    }

    let trained = engine.model().config.context_length;
    let mut sequence = engine.sequence_with(place)?;
    let mut generation = engine.generate_behind(&mut sequence, prompt.clone(), &options)?;
    let watch = Watch::begin();
    let style = engine.answer_style().ok();
    let parser = rendered.zip(style);
    let parser = parser.map(|(rendered, style)| AnswerParser::new(&style, &rendered, false));
    let printer = Printer::new(parser, !args.chat.no_thinking);
    let text = write_answer(&mut generation, printer, prompt.len(), &watch)?;

    let generated = generation.generated().expect("there are no more pieces");
    let ending = Ending {
        generated,
        text: &text,
        options: &options,
        context: place.context.unwrap_or(trained),
        trained,
    };
    for notice in ending.notices() {
        tracing::warn!("{notice}");
    }
    let stopped = watch.flow().is_break();
    if report.pruned.is_some() && !args.no_baseline && !args.quiet && !stopped {
        report.comparison = args.compare(&engine, &prompt, &options);
    }
    if !args.quiet {
        report.print(generated, &ending.reason());
    }
    Ok(watch.end()?)
}

/// Lets the model answer, and writes what it says as it comes. A signal stops it; what was generated before is there then.
fn write_answer(
    generation: &mut Generation,
    mut printer: Printer,
    prompt: usize,
    watch: &Watch,
) -> Result<String> {
    let mut text = String::new();
    let mut reading =
        (prompt > LONG_PROMPT).then(|| Work::begin("reading the prompt", Unit::Of("tokens")));
    let result = loop {
        if watch.flow().is_break() {
            break Ok(generation.stop());
        }
        let piece = match generation.step() {
            Ok(Some(piece)) => piece,
            Ok(None) => break Ok(String::new()),
            Err(error) => break Err(error),
        };
        let read = generation.timings().prompt_tokens;
        match &mut reading {
            Some(work) if read < prompt => work.at(read as u64, prompt as u64),
            _ => reading = None,
        }
        if !piece.is_empty() {
            printer.push(&piece)?;
            text += &piece;
        }
    };
    drop(reading);
    // What was written stands on lines of its own, whatever comes behind it on standard error.
    if let Ok(rest) = &result {
        text += rest;
        printer.push(rest)?;
        printer.end()?;
    } else if !text.is_empty() {
        printer.end()?;
    }
    result?;
    Ok(text)
}

impl RunArgs {
    /// The prompt; `None` where there is a terminal to talk at instead.
    fn prompt_text(&self) -> Result<Option<String>> {
        if let Some(prompt) = &self.prompt {
            return Ok(Some(prompt.clone()));
        }
        let mut text = match &self.file {
            Some(path) => read_text(path)?,
            None if self.pruning.reads_standard_input() => bail!(WrongUse::new(
                "standard input cannot be both the prompt and the calibration text; give the prompt with -p TEXT or -f FILE"
            )),
            None if io::stdin().is_terminal() => return Ok(None),
            None => read_standard_input()?,
        };
        if text.ends_with('\n') {
            text.pop();
            if text.ends_with('\r') {
                text.pop();
            }
        }
        Ok(Some(text))
    }

    /// The speeds of the pruned and the dense model. The answer is there, so that what goes wrong here is only told, and a signal ends no
    /// more than this; `None` then.
    fn compare(
        &self,
        engine: &Engine,
        prompt: &[u32],
        options: &GenerateOptions,
    ) -> Option<SpeedComparison> {
        let (sampler, kv) = (&options.sampler, self.cache.cache_type());
        let compared = engine.compare_speeds(prompt, sampler, kv, &mut progress::bars());
        compared
            .inspect_err(|error| tracing::warn!("not timed against the dense model: {error}"))
            .ok()
    }

    /// A chat in the terminal.
    fn talk(&self, mut engine: Engine, options: GenerateOptions) -> Result<()> {
        if self.raw || engine.shared_chat_template().is_none() {
            bail!(WrongUse::new(
                "there is no prompt, and without a chat template nothing to talk by; give a prompt with -p TEXT, -f FILE or on standard input"
            ));
        }
        let mut pruning = PruneOptions::default();
        if let Some(options) = self.pruning.options_if_any(!self.no_baseline)? {
            let prepared = engine.prepare(&options)?;
            words::log(prepared.notices());
            let pruned = engine.prune_prepared(prepared, &mut progress::bars())?;
            words::log(&pruned.notices);
            interrupt::check()?;
            pruning = options;
        }
        let trained = engine.model().config.context_length;
        let context = self.ctx.filter(|n| *n > 0).unwrap_or(trained);
        words::log(engine.beyond_training(context).as_slice());
        chat::talk(
            engine,
            ChatSetup {
                generate: options,
                sequence: SequenceOptions {
                    context: Some(context),
                    cache_type: self.cache.cache_type(),
                },
                system: self.chat.system(&self.model),
                pruning,
                show_thinking: !self.chat.no_thinking,
                quiet: self.quiet,
            },
        )
    }

    /// How to generate; an answer of a chat goes to where the model ends it.
    fn generate_options(&self, engine: &Engine, answers: bool) -> Result<GenerateOptions> {
        let default = if answers { usize::MAX } else { DEFAULT_TOKENS };
        Ok(GenerateOptions {
            max_tokens: self.n.unwrap_or(default),
            sampler: self.sampling.config(engine)?,
            stop: self.stop.clone(),
            ignore_end: self.ignore_eos,
            grammar: self.sampling.grammar(engine)?,
            ..GenerateOptions::default()
        })
    }

    fn sequence_options(&self, engine: &Engine, prompt: usize, tokens: usize) -> SequenceOptions {
        let trained = engine.model().config.context_length;
        let context = match self.ctx {
            Some(0) => trained,
            Some(context) => context,
            None => engine.context_for(prompt, tokens),
        };
        let notice = match self.ctx.is_none() && prompt > trained {
            true => Some(Notice::PromptBeyondTraining { prompt, trained }),
            false => engine.beyond_training(context),
        };
        words::log(notice.as_slice());
        SequenceOptions {
            context: Some(context),
            cache_type: self.cache.cache_type(),
        }
    }
}

/// Reads standard input to its end.
fn read_standard_input() -> Result<String> {
    let mut text = String::new();
    io::stdin()
        .read_to_string(&mut text)
        .context("cannot read the prompt from standard input")?;
    Ok(text)
}
