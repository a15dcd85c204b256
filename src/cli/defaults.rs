//! The user's own defaults: a file in TOML whose keys are the long names of options, at its beginning for all commands that have the
//! option, and in a table of the name of a command for that command.
//!
//! They are the parser's defaults for one call, so that what is typed and what the environment has comes first, and what has no effect
//! in a call does no harm in it. What excludes something that is typed is left out. Only where something that is typed needs another
//! option, and the file has it, that one counts as typed as well.

use std::ffi::{OsStr, OsString};
use std::io::ErrorKind as IoErrorKind;
use std::path::PathBuf;
use std::{env, fs};

use anyhow::{Context, Result};
use clap::builder::ValueHint;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, Error};
use toml::de::{DeTable, DeValue};

use super::arguments::WrongUse;

/// The environment variable that names another file; if it is empty, there is none.
pub const VARIABLE: &str = "FLAPJACK_CONFIG";

/// Commands that take nothing from the file, since they must work whatever is in it.
const EXEMPT: [&str; 4] = ["completions", "config", "help", "man"];

/// Where the file is, if it exists; `None` where there is to be none.
pub fn path() -> Option<PathBuf> {
    match env::var_os(VARIABLE) {
        Some(named) => (!named.is_empty()).then(|| named.into()),
        None => Some(dirs::config_dir()?.join("flapjack").join("config.toml")),
    }
}

// ---- the file ----

/// What the file says. All of it is right: the options exist and take the values.
#[derive(Debug)]
pub struct Defaults {
    pub path: PathBuf,
    /// In the order of the file.
    pub settings: Vec<Setting>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The command in whose table it is; `None` where it is for all commands that have the option.
    pub command: Option<String>,
    /// The name of the option, as it is written.
    pub key: String,
    /// What could be typed behind the option: several where it may be given several times, "true" or "false" of a switch.
    pub values: Vec<String>,
    line: usize,
}

impl Defaults {
    /// Reads the file; `None` if there is none. `root` is the command line, built.
    ///
    /// # Errors
    /// If the file cannot be read, or if something is wrong with it.
    pub fn read(root: &Command) -> Result<Option<Self>> {
        let Some(path) = path() else { return Ok(None) };
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error)
                if error.kind() == IoErrorKind::NotFound && env::var_os(VARIABLE).is_none() =>
            {
                return Ok(None);
            }
            Err(error) => {
                let cannot = format!("cannot read the config file {}", path.display());
                return Err(error).context(cannot);
            }
        };
        let settings = settings(root, &text).map_err(|Wrong { line, problem }| {
            WrongUse::new(format!("{}, line {line}: {problem}", path.display()))
        })?;
        Ok(Some(Self { path, settings }))
    }
}

/// What is wrong with the file, and in which line.
#[derive(Debug, PartialEq, Eq)]
struct Wrong {
    line: usize,
    problem: String,
}

/// All that a text says, if it is right.
fn settings(root: &Command, text: &str) -> Result<Vec<Setting>, Wrong> {
    let line = |offset: usize| {
        1 + text.as_bytes()[..offset]
            .iter()
            .filter(|b| **b == b'\n')
            .count()
    };
    let document = DeTable::parse(text).map_err(|error| Wrong {
        line: line(error.span().map_or(0, |span| span.start)),
        problem: format!("this is not TOML: {}", error.message()),
    })?;
    // Where things are, for they come in the order of their names.
    let mut found = Vec::new();
    for (key, value) in document.get_ref() {
        let at = key.span().start;
        let wrong = |at, problem| Wrong {
            line: line(at),
            problem,
        };
        let DeValue::Table(table) = value.get_ref() else {
            let setting = setting(root, None, key.get_ref(), value.get_ref(), line(at));
            found.push((at, setting.map_err(|problem| wrong(at, problem))?));
            continue;
        };
        let command = section(root, key.get_ref()).map_err(|problem| wrong(at, problem))?;
        for (key, value) in table {
            let at = key.span().start;
            let setting = setting(
                root,
                Some(command),
                key.get_ref(),
                value.get_ref(),
                line(at),
            );
            found.push((at, setting.map_err(|problem| wrong(at, problem))?));
        }
    }
    found.sort_by_key(|(at, _)| *at);
    let settings: Vec<Setting> = found.into_iter().map(|(_, setting)| setting).collect();
    for command in commands(root) {
        for own in [true, false] {
            let mut active: Vec<(&Setting, &Arg)> = Vec::new();
            for setting in settings.iter().filter(|s| s.command.is_some() == own) {
                let Some(option) = setting.option(command).filter(|_| setting.is_active()) else {
                    continue;
                };
                let problem = active.iter().find_map(|(other, theirs)| {
                    let (key, line) = (&other.key, other.line);
                    if theirs.get_id() == option.get_id() {
                        return Some(format!("means the same as {key} of line {line}"));
                    }
                    let excluded = exclude(command, option, theirs);
                    excluded.then(|| format!("cannot be used with {key} of line {line}"))
                });
                if let Some(problem) = problem {
                    return Err(Wrong {
                        line: setting.line,
                        problem: format!("{} {problem}", setting.key),
                    });
                }
                active.push((setting, option));
            }
        }
    }
    Ok(settings)
}

/// The commands that take something from the file.
fn commands(root: &Command) -> impl Iterator<Item = &Command> {
    let commands = root.get_subcommands();
    commands.filter(|command| !EXEMPT.contains(&command.get_name()))
}

/// The command that a table is for.
fn section<'a>(root: &'a Command, name: &str) -> Result<&'a Command, String> {
    let there = commands(root).find(|command| command.get_name() == name);
    there.ok_or_else(|| {
        let names: Vec<&str> = commands(root).map(Command::get_name).collect();
        let tip = nearest(name, &names).map_or_else(
            || format!("; there are {}", names.join(", ")),
            |near| format!("; the nearest is [{near}]"),
        );
        format!(
            "[{}] is no command that takes defaults{tip}",
            name.escape_debug()
        )
    })
}

/// The options of a command that may be in the file: those that have a name and are its own.
fn options(command: &Command) -> impl Iterator<Item = &Arg> {
    let options = command.get_arguments();
    options.filter(|option| {
        let kept = matches!(
            option.get_action(),
            ArgAction::Set | ArgAction::Append | ArgAction::SetTrue
        );
        option.get_long().is_some() && !option.is_global_set() && kept
    })
}

/// The option of a name, or of one that means the same.
fn option<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    options(command).find(|option| {
        let aliases = option.get_all_aliases().unwrap_or_default();
        option.get_long() == Some(key) || aliases.contains(&key)
    })
}

/// One setting, if there is such an option and it takes the value.
fn setting(
    root: &Command,
    command: Option<&Command>,
    key: &str,
    value: &DeValue,
    line: usize,
) -> Result<Setting, String> {
    let for_all: Vec<&Command> = match command {
        Some(command) => vec![command],
        None => commands(root).collect(),
    };
    let having = for_all.iter().filter_map(|c| Some((*c, option(c, key)?)));
    let having: Vec<(&Command, &Arg)> = having.collect();
    if having.is_empty() {
        return Err(unknown(root, command, &for_all, key));
    }
    let mut values = Vec::new();
    for (owner, option) in having {
        let of = |problem: String| match command {
            Some(_) => format!("{key}: {problem}"),
            None => {
                let name = owner.get_name();
                format!(
                    "{key}: {problem} (for flapjack {name}; what is meant for some commands only stands in their tables)"
                )
            }
        };
        values = texts(option, value).map_err(of)?;
        for text in &values {
            check(owner, option, text).map_err(of)?;
        }
    }
    Ok(Setting {
        command: command.map(|c| c.get_name().to_owned()),
        key: key.to_owned(),
        values,
        line,
    })
}

fn unknown(root: &Command, command: Option<&Command>, among: &[&Command], key: &str) -> String {
    let names: Vec<&str> = among
        .iter()
        .flat_map(|command| options(command))
        .filter_map(Arg::get_long)
        .collect();
    let near = nearest(key, &names).map(|near| format!("; the nearest is {near}"));
    let key = key.escape_debug();
    let Some(command) = command else {
        let near = near.unwrap_or_default();
        return format!("{key} is no option of any command that could have a default{near}");
    };
    let elsewhere: Vec<&str> = commands(root)
        .filter(|other| option(other, &key.to_string()).is_some())
        .map(Command::get_name)
        .collect();
    let tip = near.unwrap_or_else(|| match &elsewhere[..] {
        [] => String::new(),
        others => format!("; it is one of {}", others.join(", ")),
    });
    let name = command.get_name();
    format!("{key} is no option of flapjack {name} that could have a default{tip}")
}

/// The name that was probably meant, as the parser would find it.
fn nearest(name: &str, names: &[&str]) -> Option<String> {
    let mut names = names.to_vec();
    names.sort_unstable();
    names.dedup();
    let options = names.into_iter().map(|name| {
        let name = name.to_owned();
        Arg::new(name.clone()).long(name).action(ArgAction::SetTrue)
    });
    let scratch = Command::new("names").disable_help_flag(true).args(options);
    let error = scratch
        .try_get_matches_from(["names".to_owned(), format!("--{name}")])
        .err()?;
    match error.get(ContextKind::SuggestedArg)? {
        ContextValue::String(near) => Some(near.trim_start_matches('-').to_owned()),
        _ => None,
    }
}

/// What could be typed for a value.
fn texts(option: &Arg, value: &DeValue) -> Result<Vec<String>, String> {
    let one = |value: &DeValue| -> Result<String, String> {
        let text = match value {
            DeValue::String(text) => return Ok(in_home(option, text)),
            DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
                .map_or_else(|_| number.as_str().to_owned(), |n| n.to_string()),
            DeValue::Float(number) => number.as_str().to_owned(),
            other => {
                let what = what(other);
                return Err(format!("must be a text or a number, and is {what}"));
            }
        };
        Ok(text)
    };
    match (option.get_action(), value) {
        (ArgAction::SetTrue, DeValue::Boolean(on)) => Ok(vec![on.to_string()]),
        (ArgAction::SetTrue, other) => {
            let what = what(other);
            Err(format!("must be true or false, and is {what}"))
        }
        (ArgAction::Append, DeValue::Array(values)) => {
            values.iter().map(|value| one(value.get_ref())).collect()
        }
        (_, value) => Ok(vec![one(value)?]),
    }
}

fn what(value: &DeValue) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date or time, which stands in quotes as a text",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// The name of a file that begins with `~/` is one in the user's home folder, as shells have it.
fn in_home(option: &Arg, text: &str) -> String {
    let is_file = matches!(
        option.get_value_hint(),
        ValueHint::AnyPath | ValueHint::FilePath | ValueHint::DirPath | ValueHint::ExecutablePath
    );
    let within = text.strip_prefix("~/").filter(|_| is_file);
    match within.and_then(|rest| Some(dirs::home_dir()?.join(rest))) {
        Some(path) => path.to_string_lossy().into_owned(),
        None => text.to_owned(),
    }
}

/// Lets the parser look at a value.
fn check(command: &Command, option: &Arg, text: &str) -> Result<(), String> {
    if matches!(option.get_action(), ArgAction::SetTrue) {
        return Ok(());
    }
    let long = option.get_long().unwrap_or_default();
    let typed = [command.get_name().to_owned(), format!("--{long}={text}")];
    let Err(error) = command.clone().try_get_matches_from(typed) else {
        return Ok(());
    };
    let shown = text.escape_debug();
    match error.kind() {
        ErrorKind::ValueValidation | ErrorKind::InvalidValue => {}
        // Values are looked at before what goes together is.
        _ => return Ok(()),
    }
    let why = std::error::Error::source(&error).map(ToString::to_string);
    let valid = match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(valid)) if !valid.is_empty() => {
            Some(format!("must be one of {}", valid.join(", ")))
        }
        _ => None,
    };
    let why = why.or(valid);
    Err(match why {
        Some(why) => format!("\"{shown}\" cannot be: {why}"),
        None => format!("\"{shown}\" cannot be"),
    })
}

/// Whether the parser refuses two options together.
fn exclude(command: &Command, one: &Arg, other: &Arg) -> bool {
    let names = |a: &Arg, b: &Arg| {
        let excluded = command.get_arg_conflicts_with(a);
        excluded
            .iter()
            .any(|excluded| excluded.get_id() == b.get_id())
    };
    let shared = command.get_groups().any(|group| {
        let has = |option: &Arg| group.get_args().any(|id| id == option.get_id());
        has(one) && has(other) && !group.clone().is_multiple()
    });
    one.get_id() != other.get_id() && (shared || names(one, other) || names(other, one))
}

impl Setting {
    fn option<'a>(&self, command: &'a Command) -> Option<&'a Arg> {
        let own = self.command.as_deref();
        match own.is_none_or(|own| own == command.get_name()) {
            true => option(command, &self.key),
            false => None,
        }
    }

    /// Whether it changes anything: not where a switch is off, or a list is empty.
    fn is_active(&self) -> bool {
        !self.values.is_empty() && self.values != ["false"]
    }
}

// ---- one call ----

/// A setting, and the option of the command that is called.
#[derive(Clone)]
struct Taken<'a> {
    setting: &'a Setting,
    option: &'a Arg,
}

impl Taken<'_> {
    fn is_switch(&self) -> bool {
        matches!(self.option.get_action(), ArgAction::SetTrue)
    }

    /// As it would be typed.
    fn typed(&self) -> impl Iterator<Item = OsString> {
        let long = self.option.get_long().unwrap_or_default();
        let values = self.setting.values.iter();
        values.map(move |value| match self.is_switch() {
            true => format!("--{long}").into(),
            false => format!("--{long}={value}").into(),
        })
    }
}

/// What came of an attempt to parse.
pub struct Parsed {
    pub matches: ArgMatches,
    /// The file and what was taken from it, in words; `None` where nothing was.
    pub taken: Option<String>,
}

/// Parses the arguments, with the file's defaults where something is not given. `build` makes the command line anew.
///
/// # Errors
/// Those of the parser, also help and the version; a file that is wrong.
pub fn parse(build: fn() -> Command, arguments: &[OsString]) -> Result<Parsed> {
    let mut root = build();
    root.build();
    let (arguments, off) = switches(&root, arguments);
    let typed = match build().try_get_matches_from(&arguments) {
        Ok(matches) => matches,
        // What is there, for the file may have the rest.
        Err(error) if lacking(&error).is_some() => build()
            .ignore_errors(true)
            .try_get_matches_from(&arguments)?,
        Err(error) => return Err(error.into()),
    };
    let called = typed.subcommand().and_then(|(name, typed)| {
        let command = commands(&root).find(|command| command.get_name() == name)?;
        typed
            .subcommand_name()
            .is_none()
            .then_some((command, typed))
    });
    let defaults = match called {
        Some(_) => Defaults::read(&root)?,
        None => None,
    };
    let (Some((command, typed)), Some(defaults)) = (called, defaults) else {
        let matches = build().try_get_matches_from(arguments)?;
        return Ok(Parsed {
            matches,
            taken: None,
        });
    };
    let mut taken = for_command(command, &defaults.settings);
    let given: Vec<&Arg> = options(command)
        .filter(|option| {
            let source = typed.value_source(option.get_id().as_str());
            source.is_some_and(|source| source != ValueSource::DefaultValue)
        })
        .collect();
    taken.retain(|taken| {
        let option = taken.option;
        let other =
            |given: &&Arg| given.get_id() == option.get_id() || exclude(command, given, option);
        let is_off = off.iter().any(|off| off == option.get_id().as_str());
        taken.setting.is_active() && !is_off && !given.iter().any(other)
    });
    let matches = with(build, &arguments, command.get_name(), &taken)?;
    let words: Vec<String> = taken
        .iter()
        .map(|taken| shown(&taken.setting.key, &taken.setting.values.join(", ")))
        .collect();
    let taken =
        (!words.is_empty()).then(|| format!("{}: {}", defaults.path.display(), words.join("; ")));
    Ok(Parsed { matches, taken })
}

/// A key and its value, unless that is a secret.
pub fn shown(key: &str, value: &str) -> String {
    match key == "api-key" {
        true => format!("{key} = …"),
        false => format!("{key} = {value}"),
    }
}

/// What the file has for a command. What is in the command's own table comes before what is for all.
fn for_command<'a>(command: &'a Command, settings: &'a [Setting]) -> Vec<Taken<'a>> {
    let found = settings.iter().filter_map(|setting| {
        let option = setting.option(command)?;
        Some(Taken { setting, option })
    });
    let (mut own, others): (Vec<_>, Vec<_>) = found.partition(|t| t.setting.command.is_some());
    let others: Vec<Taken> = others
        .into_iter()
        .filter(|other| {
            !own.iter().any(|own| {
                let same = own.option.get_id() == other.option.get_id();
                same || own.setting.is_active() && exclude(command, own.option, other.option)
            })
        })
        .collect();
    own.extend(others);
    own
}

/// Parses with defaults. Where something that is typed needs an option, one of those that are taken is typed as well.
fn with(
    build: fn() -> Command,
    arguments: &[OsString],
    name: &str,
    taken: &[Taken],
) -> Result<ArgMatches, Error> {
    let attempt = |typed: &[usize]| {
        let silent = (0..taken.len()).filter(|place| !typed.contains(place));
        let root = build().mut_subcommand(name, |command| {
            silent.fold(command, |command, place| {
                let Taken { setting, option } = &taken[place];
                command.mut_arg(option.get_id(), |option| {
                    option
                        .required(false)
                        .default_values(setting.values.clone())
                })
            })
        });
        // Only switches come before the command.
        let behind = arguments.iter().skip(1).position(|a| a == OsStr::new(name));
        let behind = behind.map_or(arguments.len(), |place| place + 2);
        let mut all = arguments[..behind].to_vec();
        all.extend(typed.iter().flat_map(|place| taken[*place].typed()));
        all.extend_from_slice(&arguments[behind..]);
        root.try_get_matches_from(all)
    };
    let mut typed = Vec::new();
    loop {
        let error = match attempt(&typed) {
            Ok(matches) => return Ok(matches),
            Err(error) => error,
        };
        let Some(lacking) = lacking(&error) else {
            return Err(error);
        };
        let helps = |place: &usize| {
            let more = [&typed[..], &[*place]].concat();
            match attempt(&more) {
                Ok(_) => true,
                Err(error) => self::lacking(&error).is_some_and(|fewer| fewer < lacking),
            }
        };
        let mut others = (0..taken.len()).filter(|place| !typed.contains(place));
        match others.find(helps) {
            Some(place) => typed.push(place),
            None => return Err(error),
        }
    }
}

/// How many options are needed and not there, if that is the error.
fn lacking(error: &Error) -> Option<usize> {
    match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::Strings(options))
            if error.kind() == ErrorKind::MissingRequiredArgument =>
        {
            Some(options.len())
        }
        _ => None,
    }
}

/// `--quiet=false` turns off what the file turns on, and `--quiet=true` is `--quiet`: the arguments without the first, and with the
/// second for the third; and the ids of switches that are turned off.
fn switches(root: &Command, arguments: &[OsString]) -> (Vec<OsString>, Vec<String>) {
    let mut command = root;
    let mut off = Vec::new();
    let mut others: Vec<OsString> = Vec::new();
    let mut arguments = arguments.iter();
    others.extend(arguments.next().cloned());
    for argument in arguments.by_ref() {
        let text = argument.to_string_lossy();
        if text == "--" {
            others.push(argument.clone());
            break;
        }
        command = command.find_subcommand(&*text).unwrap_or(command);
        let parts = text
            .strip_prefix("--")
            .and_then(|text| text.split_once('='));
        let switch = parts.and_then(|(key, value)| {
            let switch = option(command, key)?;
            let is_switch = matches!(switch.get_action(), ArgAction::SetTrue);
            is_switch.then_some((key, switch, value))
        });
        match switch {
            Some((key, _, "true")) => others.push(format!("--{key}").into()),
            Some((_, switch, "false")) => off.push(switch.get_id().to_string()),
            _ => others.push(argument.clone()),
        }
    }
    others.extend(arguments.cloned());
    (others, off)
}
