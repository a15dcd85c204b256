//! Conversations: their options, how an answer is shown, and the chat in a terminal that `flapjack run` is without a prompt.

use std::fs;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::ValueHint;
use flapjack::chat::{self, AnswerParser, ChatOptions, ChatTemplate, Message, Piece};
use flapjack::engine::{
    Conversation, Engine, EngineError, GenerateOptions, PruneOptions, Reply, SequenceOptions,
    Target,
};
use flapjack::generate::Finish;
use flapjack::hub;
use rustyline::error::ReadlineError;
use rustyline::{Config, DefaultEditor};

use super::arguments::ModelArgs;
use super::interrupt::Watch;
use super::streams::Output;
use super::words::{plural, say};
use super::{arguments, heading, progress, streams, words};

/// Options of conversations.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = heading::TEXT)]
pub struct ChatArgs {
    /// What stands before the user's messages
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Write conversations by this template: a file, or a name
    ///
    /// Names are chatml, deepseek, gemma, llama2, llama3, mistral, phi3 and zephyr. By default the one of the model's file, or of a
    /// chat_template.jinja or tokenizer_config.json beside it.
    #[arg(long, value_name = "FILE|NAME", value_hint = ValueHint::FilePath)]
    chat_template: Option<String>,
    /// Do not show what the model thinks before it answers
    #[arg(long)]
    pub no_thinking: bool,
}

impl ChatArgs {
    /// Gives the model the template that was asked for.
    pub fn prepare(&self, engine: &mut Engine) -> Result<()> {
        let Some(name) = &self.chat_template else {
            return Ok(());
        };
        let template = match chat::builtin_names().any(|known| known == name) {
            true => ChatTemplate::builtin(name).expect("a template of a name that is listed"),
            false => ChatTemplate::from_file(name).map_err(EngineError::from)?,
        };
        engine.set_chat_template(template);
        Ok(())
    }

    /// What stands before the messages of a conversation; `None` for what the template puts there.
    pub fn system(&self, model: &ModelArgs) -> Option<String> {
        let own = model.name().is_none() && self.chat_template.is_none();
        let default = own.then(|| hub::DEFAULT_SYSTEM.to_owned());
        self.system.clone().or(default)
    }

    /// A conversation that begins with this message of the user.
    pub fn messages(&self, model: &ModelArgs, message: &str) -> Vec<Message> {
        let system = self.system(model).map(Message::system);
        system.into_iter().chain([Message::user(message)]).collect()
    }
}

/// Lines of earlier chats that the arrow keys find.
const HISTORY: usize = 1000;

const HELP: &str = "\
/help            this list
/system [TEXT]   set the system message, or show it
/reset           forget what was said
/regen           answer the last message anew
/prune R         prune the model by the ratio R (0: as it was)
/save FILE       write what was said to a file
/load FILE       go on with what a file has
/stats           what the model and the conversation take
/exit            leave (as Ctrl-D does)
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one, and so does what stands between two lines of \"\"\".";

/// How to chat.
pub struct ChatSetup {
    pub generate: GenerateOptions,
    pub sequence: SequenceOptions,
    pub system: Option<String>,
    /// What `/prune` leaves open.
    pub pruning: PruneOptions,
    /// Whether what the model thinks before it answers is shown.
    pub show_thinking: bool,
    pub quiet: bool,
}

/// Talks until the user leaves.
pub fn talk(engine: Engine, setup: ChatSetup) -> Result<()> {
    engine.chat_template()?;
    let mut conversation = Conversation::new(setup.sequence, ChatOptions::default());
    conversation.set_system(setup.system.clone());
    let mut chat = Chat {
        engine,
        conversation,
        setup,
    };
    let config = Config::builder().max_history_size(HISTORY)?.build();
    let mut editor = DefaultEditor::with_config(config).context("the terminal cannot be used")?;
    let history = history_file();
    if let Some(path) = &history {
        // There is none before the first chat.
        let _ = editor.load_history(path);
    }
    if !chat.setup.quiet {
        let model = hub::name_of_file(chat.engine.model().path());
        say(&format!("{model}: /help lists commands, Ctrl-D leaves"));
    }
    let left = chat.talk(&mut editor);
    if let Some(path) = &history {
        keep_history(&mut editor, path);
    }
    left
}

/// Where earlier lines are kept; `None` where there is no folder for such things.
fn history_file() -> Option<PathBuf> {
    let folder = dirs::state_dir().or_else(dirs::data_local_dir)?;
    Some(folder.join("flapjack").join("history"))
}

/// A history that cannot be kept is no reason to trouble anybody.
fn keep_history(editor: &mut DefaultEditor, path: &Path) {
    let made = path.parent().map(fs::create_dir_all);
    if !matches!(made, Some(Ok(()))) || editor.save_history(path).is_err() {
        tracing::info!("the history cannot be written to {}", path.display());
    }
}

struct Chat {
    engine: Engine,
    conversation: Conversation,
    setup: ChatSetup,
}

impl Chat {
    fn talk(&mut self, editor: &mut DefaultEditor) -> Result<()> {
        loop {
            let message = match read_message(editor) {
                Ok(Some(message)) => message,
                Ok(None) => continue,
                Err(ReadlineError::Interrupted) => {
                    say("(Ctrl-D leaves)");
                    continue;
                }
                Err(ReadlineError::Eof) => return Ok(()),
                Err(error) => return Err(error).context("the terminal cannot be read"),
            };
            let _ = editor.add_history_entry(&message);
            let done = match message.strip_prefix('/') {
                Some(command) => self.command(command),
                None => self.ask(message).map(|()| ControlFlow::Continue(())),
            };
            match done {
                Ok(ControlFlow::Break(())) => return Ok(()),
                Ok(ControlFlow::Continue(())) => {}
                // Nothing that goes wrong in one turn need end the conversation.
                Err(error) => say(&format!("error: {}", words::describe(&error))),
            }
        }
    }

    fn command(&mut self, command: &str) -> Result<ControlFlow<()>> {
        let (name, rest) = command
            .split_once(char::is_whitespace)
            .unwrap_or((command, ""));
        let rest = rest.trim();
        match name {
            "help" | "?" => say(HELP),
            "exit" | "quit" | "bye" => return Ok(ControlFlow::Break(())),
            "reset" | "clear" => {
                self.conversation.reset();
                say("forgotten");
            }
            "system" if rest.is_empty() => match self.conversation.system() {
                Some(system) => say(system),
                None => say("there is no system message"),
            },
            "system" => {
                self.conversation.set_system(Some(rest.to_owned()));
                say("from the next message on");
            }
            "regen" => self.ask_again()?,
            "prune" => self.prune(rest)?,
            "save" => self.save(rest)?,
            "load" => self.load(rest)?,
            "stats" => self.stats(),
            _ => say(&format!("there is no /{name}; /help lists what there is")),
        }
        Ok(ControlFlow::Continue(()))
    }

    fn ask(&mut self, message: String) -> Result<()> {
        let mut shown = Shown::new(self.setup.show_thinking);
        let (generate, engine) = (&self.setup.generate, &self.engine);
        let reply = self
            .conversation
            .ask(engine, message, generate, &mut |parts| shown.step(parts));
        shown.end(&reply)?;
        self.tell(&reply?);
        Ok(())
    }

    fn ask_again(&mut self) -> Result<()> {
        let mut shown = Shown::new(self.setup.show_thinking);
        let mut options = self.setup.generate.clone();
        // The same seed would give the same answer.
        options.sampler.seed = options.sampler.seed.wrapping_add(1);
        self.setup.generate.sampler.seed = options.sampler.seed;
        let engine = &self.engine;
        let reply = self
            .conversation
            .ask_again(engine, &options, &mut |parts| shown.step(parts));
        match reply.transpose() {
            Some(reply) => {
                shown.end(&reply)?;
                self.tell(&reply?);
            }
            None => say("nothing was asked yet"),
        }
        Ok(())
    }

    /// What there is to know about an answer, and what it took.
    fn tell(&self, reply: &Reply) {
        if reply.newly_left_out > 0 {
            say(&format!(
                "the conversation is longer than the context: the model no longer reads the oldest {}",
                plural(reply.newly_left_out, "message")
            ));
        }
        match reply.finish {
            Some(Finish::ContextFull) => {
                say("the answer ends here because the context is full; /reset makes room");
            }
            Some(Finish::Stopped) => {}
            _ if reply.text.trim().is_empty() => {
                say("the model had nothing to say; /regen asks again");
            }
            _ => {}
        }
        if !self.setup.quiet {
            let speed = reply.timings.generation_speed();
            let speed = speed.map(|speed| format!(", {speed:.1} tokens/s"));
            let tokens = plural(reply.tokens, "token");
            say(&dim(&format!("[{tokens}{}]", speed.unwrap_or_default())));
        }
    }

    fn prune(&mut self, ratio: &str) -> Result<()> {
        let ratio = arguments::parse_ratio(ratio)
            .map_err(|error| anyhow::anyhow!("/prune takes a ratio, which {error}"))?;
        if self.engine.pruned().is_some() {
            self.engine.reopen()?;
        }
        self.conversation.forget_cache();
        if ratio > 0.0 {
            let options = PruneOptions {
                target: Target::Ratio(ratio),
                effects: true,
                ..self.setup.pruning.clone()
            };
            let pruned = self.engine.prune(&options, &mut progress::bars());
            if pruned.is_err() {
                // Broken off in the middle, it would be of no use.
                self.engine.reopen()?;
            }
            let pruned = pruned?;
            words::log(&pruned.notices);
            say(&words::gone(&pruned));
        }
        self.stats();
        Ok(())
    }

    fn save(&self, path: &str) -> Result<()> {
        if path.is_empty() {
            bail!("name a file to save to");
        }
        let system = self.conversation.system().map(Message::system);
        let messages: Vec<Message> = system
            .into_iter()
            .chain(self.conversation.messages().iter().cloned())
            .collect();
        let mut text = serde_json::to_string_pretty(&messages)?;
        text.push('\n');
        fs::write(path, text).with_context(|| format!("cannot write {path}"))?;
        say(&format!("{} in {path}", plural(messages.len(), "message")));
        Ok(())
    }

    fn load(&mut self, path: &str) -> Result<()> {
        if path.is_empty() {
            bail!("name a file to load");
        }
        let text = arguments::read_text(Path::new(path))?;
        let messages: Vec<Message> = serde_json::from_str(&text)
            .with_context(|| format!("{path} is no list of messages with role and content"))?;
        say(&format!(
            "{} from {path}",
            plural(messages.len(), "message")
        ));
        self.conversation.set_messages(messages);
        Ok(())
    }

    fn stats(&self) {
        let (filled, context) = self.conversation.fill(&self.engine);
        let model = self.engine.report();
        say(&format!(
            "model: {}, {} parameters; {}",
            words::megabytes(model.bytes),
            words::millions(model.parameters),
            match self.engine.pruned() {
                Some(pruned) => words::gone(pruned),
                None => "dense".to_owned(),
            }
        ));
        say(&format!(
            "conversation: {}; {filled} of {context} positions are filled",
            plural(self.conversation.messages().len(), "message")
        ));
    }
}

/// An answer on its way to the terminal.
struct Shown {
    printer: Printer,
    watch: Watch,
    failed: Option<io::Error>,
}

impl Shown {
    fn new(show_thinking: bool) -> Self {
        Self {
            printer: Printer::new(None, show_thinking),
            watch: Watch::begin(),
            failed: None,
        }
    }

    /// Writes what a step has brought; a signal, or a terminal that is gone, ends the answer.
    fn step(&mut self, pieces: &[Piece]) -> ControlFlow<()> {
        if let Err(error) = self.printer.print(pieces) {
            self.failed = Some(error);
            return ControlFlow::Break(());
        }
        self.watch.flow()
    }

    /// Ends the answer; a signal has then done what it is for.
    fn end<T, E>(mut self, reply: &Result<T, E>) -> io::Result<()> {
        let _ = self.watch.end();
        match self.failed {
            Some(error) => Err(error),
            None if reply.is_ok() => self.printer.end(),
            None => Ok(()),
        }
    }
}

/// Reads a message of one line or several; `None` for an empty one.
fn read_message(editor: &mut DefaultEditor) -> Result<Option<String>, ReadlineError> {
    const FENCE: &str = "\"\"\"";
    let first = editor.readline("> ")?;
    let mut message = first.trim_end().to_owned();
    if message.trim_start().starts_with(FENCE) {
        message = message.trim_start()[FENCE.len()..].to_owned();
        while !message.trim_end().ends_with(FENCE) {
            message.push('\n');
            message.push_str(&editor.readline("… ")?);
        }
        let end = message.trim_end().len() - FENCE.len();
        message.truncate(end);
        message = message.trim_matches('\n').to_owned();
    } else {
        while message.ends_with('\\') {
            message.pop();
            message.push('\n');
            message.push_str(editor.readline("… ")?.trim_end());
        }
    }
    Ok(Some(message).filter(|message| !message.trim().is_empty()))
}

const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// A remark beside the conversation.
fn dim(text: &str) -> String {
    match streams::has_colours() {
        true => format!("{DIM}{text}{PLAIN}"),
        false => text.to_owned(),
    }
}

/// Writes an answer to standard output as it comes; what the model thinks before it is dimmed on a terminal, or left out.
pub struct Printer {
    out: Output,
    /// Takes the answer apart; `None` for text as it stands.
    parser: Option<AnswerParser>,
    show_thinking: bool,
    dims: bool,
    /// Whether what was written last is what the model thinks.
    thinking: bool,
}

impl Printer {
    pub fn new(parser: Option<AnswerParser>, show_thinking: bool) -> Self {
        Self {
            out: Output::new(),
            parser,
            show_thinking,
            dims: streams::output_has_colours(),
            thinking: false,
        }
    }

    /// Writes more of the answer.
    pub fn push(&mut self, text: &str) -> io::Result<()> {
        match &mut self.parser {
            Some(parser) => {
                let pieces = parser.push(text);
                self.print(&pieces)
            }
            None => self.write(text, false),
        }
    }

    /// Writes parts of an answer that has been taken apart.
    fn print(&mut self, pieces: &[Piece]) -> io::Result<()> {
        for piece in pieces {
            match piece {
                Piece::Text(text) => self.write(text, false)?,
                Piece::Reasoning(text) if self.show_thinking => self.write(text, true)?,
                Piece::Reasoning(_) | Piece::Call(_) => {}
            }
        }
        Ok(())
    }

    fn write(&mut self, text: &str, thinking: bool) -> io::Result<()> {
        if thinking != self.thinking {
            self.thinking = thinking;
            if self.dims {
                write!(self.out, "{}", if thinking { DIM } else { PLAIN })?;
            }
            if !thinking {
                write!(self.out, "\n\n")?;
            }
        }
        write!(self.out, "{text}")?;
        self.out.flush()
    }

    /// Ends the answer, and its last line.
    pub fn end(&mut self) -> io::Result<()> {
        if let Some(parser) = self.parser.take() {
            let rest = parser.finish();
            self.print(&rest)?;
        }
        if self.dims && self.thinking {
            write!(self.out, "{PLAIN}")?;
        }
        writeln!(self.out)?;
        self.out.flush()
    }
}
