//! Completion scripts and manual pages: what the help has, for shells and for `man`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::program::{program, run_with_input, stderr, stdout, succeeded};

const SHELLS: [&str; 5] = ["bash", "zsh", "fish", "elvish", "powershell"];

fn flapjack(arguments: &[&str]) -> String {
    let mut command = program();
    command.args(arguments);
    succeeded(&run_with_input(command, b"")).0
}

/// All commands, as the help lists them, with those within them: `cache`, `cache clear`.
fn commands() -> Vec<Vec<String>> {
    fn within(path: &[String], all: &mut Vec<Vec<String>>) {
        let mut arguments: Vec<&str> = path.iter().map(String::as_str).collect();
        arguments.push("-h");
        let help = flapjack(&arguments);
        let listed = help.split("\nCommands:\n").nth(1).unwrap_or_default();
        for line in listed.lines().take_while(|line| line.starts_with("  ")) {
            let name = line.split_whitespace().next().unwrap();
            if name != "help" {
                let deeper = [path, &[name.to_owned()]].concat();
                all.push(deeper.clone());
                within(&deeper, all);
            }
        }
    }
    let mut all = Vec::new();
    within(&[], &mut all);
    assert!(all.len() >= 15, "{all:?}");
    all
}

/// The long options of a command, as its help has them at the beginning of an entry.
fn options(command: &[String]) -> BTreeSet<String> {
    let mut arguments: Vec<&str> = command.iter().map(String::as_str).collect();
    arguments.push("--help");
    let help = flapjack(&arguments);
    let entries = help.lines().filter(|l| l.trim_start().starts_with('-'));
    let found = entries.filter_map(|line| {
        let name = line.split("--").nth(1)?;
        let name = name.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
        Some(format!("--{}", name.into_iter().next()?))
    });
    found.collect()
}

fn has(program: &str) -> bool {
    let found = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    // 127: it is there, but not what it needs.
    found.is_ok_and(|status| status.code() != Some(127))
}

// ---- completions ----

#[test]
fn scripts_have_all_commands_and_options_and_nothing_of_other_programs() {
    let commands = commands();
    let all: BTreeSet<String> = commands.iter().flat_map(|c| options(c)).collect();
    assert!(all.len() > 80, "{all:?}");
    for shell in SHELLS {
        let script = flapjack(&["completions", shell]);
        for command in &commands {
            let name = command.last().unwrap();
            assert!(script.contains(name.as_str()), "{shell}: {command:?}");
        }
        for option in &all {
            let found = match shell {
                "fish" => script.contains(&format!("-l {} ", &option[2..])),
                _ => script.contains(option.as_str()),
            };
            assert!(found, "{shell}: {option}");
        }
        for (other, fish) in [
            ("--gpu-layers", "-l gpu-layers"),
            ("--flash-attn", "-l flash-attn"),
            ("--mlock", "-l mlock"),
            ("--hf-file", "-l hf-file"),
        ] {
            if !all.contains(other) {
                assert!(!script.contains(other), "{shell}: {other}");
                assert!(!script.contains(fish), "{shell}: {other}");
            }
        }
        // Choices are completed, where the generator can do that.
        for choice in ["wanda-sp", "q8_0", "al-am", "sequential"] {
            let can = ["bash", "zsh", "fish"].contains(&shell);
            assert!(!can || script.contains(choice), "{shell}: {choice}");
        }
    }
}

#[test]
fn a_shell_that_is_none_is_refused_with_those_there_are() {
    let mut command = program();
    command.args(["completions", "cmd"]);
    let output = run_with_input(command, b"");
    assert_eq!(output.status.code(), Some(2));
    for shell in SHELLS {
        assert!(stderr(&output).contains(shell), "{}", stderr(&output));
    }
}

/// The script as a shell runs it: what it offers behind some words.
#[test]
fn bash_takes_the_script_and_completes_by_it() {
    if !has("bash") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("flapjack.bash");
    fs::write(&script, flapjack(&["completions", "bash"])).unwrap();
    let checked = Command::new("bash")
        .arg("-n")
        .arg(&script)
        .output()
        .unwrap();
    assert!(
        checked.status.success() && checked.stderr.is_empty(),
        "{}",
        stderr(&checked)
    );
    let offered = |words: &[&str]| {
        let last = words.len() - 1;
        let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
        let code = format!(
            "source \"$1\"; complete -p flapjack >&2; COMP_WORDS=({}); COMP_CWORD={last}; \
             _flapjack flapjack '{}' '{}'; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            quoted.join(" "),
            words[last],
            words[last - 1],
        );
        let output = Command::new("bash")
            .args(["--norc", "-c", &code, "bash"])
            .arg(&script)
            .output()
            .unwrap();
        assert!(
            stderr(&output).contains("-F _flapjack"),
            "{}",
            stderr(&output)
        );
        let text = stdout(&output);
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(offered(&["flapjack", "per"]), ["perplexity"]);
    assert_eq!(offered(&["flapjack", "cache", "cl"]), ["clear"]);
    assert_eq!(offered(&["flapjack", "run", "--max-p"]), ["--max-ppl"]);
    assert_eq!(offered(&["flapjack", "run", "--kv", "q"]), ["q8_0"]);
    assert_eq!(
        offered(&["flapjack", "run", "--effort", ""]),
        ["fast", "normal", "best"]
    );
    assert!(offered(&["flapjack", "completions", ""]).contains(&"zsh".to_owned()));
}

#[test]
fn other_shells_take_their_scripts_where_they_are_there() {
    let folder = tempfile::tempdir().unwrap();
    for (shell, check) in [("zsh", "-n"), ("fish", "--no-execute")] {
        if !has(shell) {
            continue;
        }
        let script = folder.path().join(shell);
        fs::write(&script, flapjack(&["completions", shell])).unwrap();
        let checked = Command::new(shell)
            .arg(check)
            .arg(&script)
            .output()
            .unwrap();
        assert!(checked.status.success(), "{shell}: {}", stderr(&checked));
    }
}

// ---- manual pages ----

/// The text of a page, without what is only for the typesetter.
fn plain(page: &str) -> String {
    let page = page
        .replace("\\-", "-")
        .replace("\\ ", " ")
        .replace("\\*(Aq", "'");
    let page = page
        .replace("\\fB", "")
        .replace("\\fI", "")
        .replace("\\fR", "");
    page.replace("\\.", ".")
        .replace("\\&", "")
        .replace("\\\\", "\\")
}

fn page(folder: &Path, command: &[String]) -> String {
    let name = [&["flapjack".to_owned()], command].concat().join("-");
    let path = folder.join(format!("{name}.1"));
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn every_command_has_a_page_with_its_options_under_their_headings_and_its_examples() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("not/yet/there");
    assert_eq!(flapjack(&["man", folder.to_str().unwrap()]), "");
    let commands = commands();
    // One more for the program as a whole.
    assert_eq!(fs::read_dir(&folder).unwrap().count(), commands.len() + 1);
    for command in &commands {
        let text = page(&folder, command);
        let text = plain(&text);
        for option in options(command) {
            let found = text.lines().any(|line| {
                let mut names = line.split([' ', ',', '[']);
                line.starts_with('-') && names.any(|name| name == option)
            });
            assert!(found, "{command:?}: {option}");
        }
        let name = format!("flapjack-{}", command.join("-"));
        assert!(text.contains(&format!(".SH NAME\n{name} - ")), "{text}");
        assert!(text.contains(".SH GENERAL"), "{command:?}");
        if let [name] = &command[..] {
            let examples = text.split(".SH EXAMPLES\n.nf\n").nth(1).expect("examples");
            let examples = examples.split("\n.fi").next().unwrap();
            let help = flapjack(&[name, "-h"]);
            let theirs = help.split("\nExamples:\n").nth(1).unwrap();
            let theirs: Vec<&str> = theirs.lines().map(str::trim).collect();
            let ours: Vec<&str> = examples.lines().map(str::trim).collect();
            assert_eq!(ours, theirs, "{name}");
        }
    }
    let run = plain(&page(&folder, &["run".to_owned()]));
    let order = [
        ".SH MODEL",
        ".SH TEXT",
        ".SH SAMPLING",
        ".SH HOW MUCH TO PRUNE",
        ".SH HOW TO PRUNE",
        ".SH CALIBRATION",
        ".SH MACHINE",
        ".SH OUTPUT",
        ".SH GENERAL",
        ".SH EXAMPLES",
    ];
    let order = order.map(|heading| {
        let quoted = heading.replacen(' ', " \"", 1) + "\"";
        let place = run.find(heading).or_else(|| run.find(&quoted));
        place.unwrap_or_else(|| panic!("{heading}: {run}"))
    });
    assert!(order.is_sorted(), "{order:?}");
    // Texts of options that the short help leaves out, other names, and choices.
    for words in [
        "What makes a head or channel worth keeping",
        "[aliases: --ratio]",
        "wanda-sp",
    ] {
        assert!(run.contains(words), "{words}: {run}");
    }
}

#[test]
fn the_main_page_goes_to_standard_output_and_leads_on() {
    let text = plain(&flapjack(&["man"]));
    for words in [
        ".TH \"FLAPJACK\" \"1\" \"\" \"flapjack ",
        "flapjack-run(1)",
        "flapjack-models(1)",
        "FLAPJACK_CONFIG",
        "config.toml",
        ".SH \"EXIT STATUS\"",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert!(!text.contains("flapjack-help"), "{text}");
}

#[test]
fn pages_are_typeset_without_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    flapjack(&["man", folder.path().to_str().unwrap()]);
    let typesetters = [
        ("groff", &["-man", "-Tutf8", "-ww", "-z"][..]),
        // It would like a date.
        ("mandoc", &["-Tlint", "-W", "warning,stop"]),
    ];
    for (typesetter, arguments) in typesetters {
        if !has(typesetter) {
            continue;
        }
        for entry in fs::read_dir(folder.path()).unwrap() {
            let path = entry.unwrap().path();
            let output = Command::new(typesetter)
                .args(arguments)
                .arg(&path)
                .output()
                .unwrap();
            let said = stderr(&output) + &stdout(&output);
            // Without its fonts and macros there is nothing that it could do.
            if said.contains("can't open device file") || said.contains("can't find macro file") {
                break;
            }
            let mut lines = said.lines().filter(|line| !line.contains("missing date"));
            assert_eq!(lines.next(), None, "{}: {said}", path.display());
        }
    }
}

#[test]
fn a_folder_that_cannot_be_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let mut command = program();
    command.arg("man").arg(file.join("within"));
    let output = run_with_input(command, b"");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("cannot write"),
        "{}",
        stderr(&output)
    );
}
