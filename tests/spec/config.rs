//! The config file: defaults of the user's own. What is typed comes first, then the environment, then the file, then what the model
//! recommends, then what is built in.

use std::fs;
use std::path::PathBuf;
use std::process::Output;

use crate::common::engine::Workshop;
use crate::common::program::{program, run_with_input, stderr, stdout, succeeded};

/// A small model, a cache folder, and a config file.
struct Place {
    workshop: Workshop,
    file: PathBuf,
}

impl Place {
    fn new(config: &str) -> Self {
        let workshop = Workshop::new();
        let model = workshop.model.to_str().unwrap();
        let file = workshop.write("config.toml", config.replace("MODEL", model));
        Self { workshop, file }
    }

    /// Runs the program with arguments with spaces between, MODEL being the model.
    fn output(&self, arguments: &str) -> Output {
        self.with(arguments, &[])
    }

    fn with(&self, arguments: &str, environment: &[(&str, &str)]) -> Output {
        let mut command = program();
        let model = self.workshop.model.to_str().unwrap();
        let arguments = arguments.split(' ').map(|a| a.replace("MODEL", model));
        command.args(arguments);
        command.env("FLAPJACK_CONFIG", &self.file);
        command.env("FLAPJACK_CACHE", self.workshop.path(""));
        command.envs(environment.iter().copied());
        run_with_input(command, b"")
    }

    /// Standard output and error of a run that must succeed.
    fn succeed(&self, arguments: &str) -> (String, String) {
        succeeded(&self.output(arguments))
    }

    /// The message of a run that must be refused as wrong use.
    fn refused(&self, arguments: &str) -> String {
        let output = self.output(arguments);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{arguments}: {}",
            stderr(&output)
        );
        assert_eq!(stdout(&output), "");
        stderr(&output)
    }
}

// ---- precedence ----

#[test]
fn what_is_typed_comes_before_the_file_and_the_file_before_what_is_built_in() {
    let place =
        Place::new("threads = 1\n[run]\nmodel = 'MODEL'\nn = 3\ntemp = 0\nignore-eos = true\n");
    let report = place.succeed("run -p x").1;
    assert!(
        report.contains("generate   3 tokens") && report.contains("1 thread"),
        "{report}"
    );
    let report = place.succeed("run -p x -n 5").1;
    assert!(report.contains("generate   5 tokens"), "{report}");
    // Under any of its names.
    let report = place.succeed("run -p x --n-predict 4").1;
    assert!(report.contains("generate   4 tokens"), "{report}");
    // Without the file.
    let output = place.with("run -p x -n 2 -m MODEL", &[("FLAPJACK_CONFIG", "")]);
    assert!(
        stderr(&output).contains("generate   2 tokens"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_commands_own_table_comes_before_what_is_for_all() {
    let place = Place::new("ctx = 96\nn = 2\n[run]\nctx = 64\n[bench]\nrepetitions = 1\n");
    let (_, said) = place.succeed("run -p x -m MODEL -n -1 --ignore-eos");
    assert!(said.contains("the context of 64 tokens is full"), "{said}");
    let text = place
        .workshop
        .write("text.txt", "It was the best of days. ".repeat(40));
    let line = place
        .succeed(&format!("perplexity -m MODEL -f {}", text.display()))
        .0;
    assert!(line.contains("chunks of 96"), "{line}");
}

#[test]
fn the_file_comes_before_what_the_model_recommends() {
    let place = Place::new("[run]\ntop-k = 7\n");
    place
        .workshop
        .write("generation_config.json", r#"{"top_k": 9, "top_p": 0.7}"#);
    let log = place.succeed("run -v -p x -n 1 -m MODEL").1;
    assert!(log.contains("top_k 7") || log.contains("top-k 7"), "{log}");
    assert!(!log.contains("top_k 9") && log.contains("0.7"), "{log}");
    let log = place.succeed("run -v -p x -n 1 -m MODEL --top-k 5").1;
    assert!(log.contains("top_k 5") || log.contains("top-k 5"), "{log}");
}

/// A server that nobody can reach, since its address is none of this machine's, tells before that whether it wants a key.
#[test]
fn the_environment_comes_before_the_file() {
    let place = Place::new("[serve]\napi-key = 'of the file'\nmodel = 'MODEL'\n");
    let log = |key: &str| {
        let environment = [("FLAPJACK_API_KEY", key)];
        let output = place.with("serve -v --host 192.0.2.1", &environment);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        stderr(&output)
    };
    let taken = log("of the environment");
    assert!(!taken.contains("api-key"), "{taken}");
    let output = place.output("serve -v --host 192.0.2.1");
    let said = stderr(&output);
    assert!(said.contains("api-key = …"), "{said}");
    assert!(!said.contains("of the file"), "{said}");
    let typed = place.output("serve -v --host 192.0.2.1 --api-key x");
    assert!(!stderr(&typed).contains("api-key ="), "{}", stderr(&typed));
}

// ---- values ----

#[test]
fn lists_are_for_options_that_may_be_given_several_times_and_what_is_typed_takes_their_place() {
    let place = Place::new(
        "[run]\nmodel = 'MODEL'\nn = 200\nignore-eos = true\nstop = ['a', 'e', 'i', 'o', 'u', ' ']\n",
    );
    let (_, said) = place.succeed("run --raw -p x --temp 1");
    assert!(said.contains("stop"), "{said}");
    let said = place
        .succeed("run --raw -p x --temp 1 -n 5 --stop never-comes")
        .1;
    assert!(said.contains("generate   5 tokens"), "{said}");
    let place = Place::new(
        "[bench]\nmodel = 'MODEL'\nn-prompt = [4, 8]\nn-gen = '2,3'\nrepetitions = 1\noutput = 'csv'\n",
    );
    let table = place.succeed("bench").0;
    assert_eq!(table.lines().count(), 5, "{table}");
}

#[test]
fn switches_are_true_or_false_and_can_be_turned_off() {
    let place = Place::new(
        "json = true\n[run]\nquiet = true\nmodel = 'MODEL'\nn = 1\n[models]\njson = false\n",
    );
    assert_eq!(place.succeed("run -p x").1, "");
    let report = place.succeed("run -p x --quiet=false").1;
    assert!(report.contains("generate"), "{report}");
    assert_eq!(place.succeed("run -p x --quiet=true").1, "");
    assert!(place.succeed("cache").0.starts_with('{'));
    assert!(!place.succeed("cache --json=false").0.starts_with('{'));
    assert!(!place.succeed("models").0.starts_with('{'));
    // Also where there is no file.
    let output = place.with("cache --json=false", &[("FLAPJACK_CONFIG", "")]);
    assert!(!succeeded(&output).0.starts_with('{'));
    let output = place.output("run -p x --quiet=maybe");
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

#[test]
#[cfg(unix)]
fn names_of_files_may_begin_with_the_home_folder() {
    let place = Place::new("[run]\nmodel = '~/tiny.gguf'\nstop = '~/tiny.gguf'\nn = 1\n");
    let home = place.workshop.path("");
    let home = home.to_str().unwrap();
    let output = place.with("run -p x", &[("HOME", home)]);
    assert!(succeeded(&output).1.contains("tiny.gguf"));
    // Only those.
    let shown = place.with("config", &[("HOME", home)]);
    assert!(succeeded(&shown).0.contains("stop = ~/tiny.gguf"));
}

// ---- what goes together ----

#[test]
fn a_default_that_has_no_effect_in_a_call_does_no_harm() {
    // None of these is asked for without an amount to prune, --raw and so on, where they are typed.
    let place = Place::new(
        "[run]\nmodel = 'MODEL'\nn = 1\ncalib-tokens = 300\neffort = 'fast'\nmethod = 'flap'\nno-baseline = true\n\
         special = true\ncalib-field = 'body'\n[serve]\ncompare = true\n\
         [bench]\nmodel = 'MODEL'\nsynthetic-type = 'q8_0'\nparallel = 2\ncalib-tokens = 300\nrepetitions = 1\n",
    );
    place.succeed("run -p x");
    place.succeed("bench -p 4 -n 0");
    // There is nothing to compare, and the address is none of this machine's.
    let output = place.output("serve -m MODEL --host 192.0.2.1");
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    // They count where they have an effect.
    let report = place.succeed("run -p x --prune 0.2").1;
    assert!(
        report.contains("300 tokens") && !report.contains("dense"),
        "{report}"
    );
}

#[test]
fn what_is_typed_may_need_what_the_file_has() {
    let place = Place::new(
        "[run]\nmodel = 'MODEL'\nn = 1\nprune = 0.2\nmethod = 'flap'\ncalib-tokens = 300\n[prune]\nratio = 0.3\nmodel = 'MODEL'\nmethod = 'flap'\ncalib-tokens = 300\n",
    );
    let profile = place.workshop.path("a.profile");
    let profile = profile.to_str().unwrap();
    place.succeed(&format!(
        "calibrate -m MODEL --method flap --calib-tokens 256 -o {profile}"
    ));
    // A profile does not go with the file's number of tokens.
    let report = place.succeed(&format!("run -p x --profile {profile}")).1;
    assert!(
        report.contains("from a profile") && report.contains("removed 2"),
        "{report}"
    );
    let report = place.succeed("run -p x --no-baseline").1;
    assert!(
        report.contains("prune") && !report.contains("dense"),
        "{report}"
    );
    let report = place.succeed("run -p x --heads group").1;
    assert!(report.contains("group"), "{report}");
    // An amount that must be there.
    let out = place.workshop.path("out.gguf");
    let report = place.succeed(&format!("prune -o {}", out.display())).1;
    assert!(report.contains("asked 30.0 %"), "{report}");
    // What is not in the file is still asked for.
    let none = Place::new("[run]\nmodel = 'MODEL'\nmethod = 'flap'\n");
    assert!(none.refused("run -p x --no-baseline").contains("--prune"));
    assert!(none.refused("prune -o x.gguf").contains("--fit"));
}

#[test]
fn what_is_typed_takes_the_place_of_what_it_excludes() {
    let place = Place::new(
        "[run]\nmodel = 'MODEL'\nn = 1\nprune = 0.2\nmethod = 'flap'\nfile = 'nowhere.txt'\nprofile = 'nowhere.profile'\n",
    );
    let report = place.succeed("run -p x --fit 500kB --calib-tokens 300").1;
    assert!(report.contains("find"), "{report}");
    let report = place.succeed("run -p x --prune 0 --calib-tokens 300").1;
    assert!(!report.contains("removed"), "{report}");
    // The table of a command takes the place of what is for all.
    let place = Place::new(
        "prune = 0.2\ncalib-tokens = 300\nmethod = 'flap'\n[run]\nmodel = 'MODEL'\nn = 1\nfit = '1GB'\n",
    );
    let report = place.succeed("run -p x").1;
    assert!(
        report.contains("find") || !report.contains("removed 2"),
        "{report}"
    );
    let place = Place::new("[bench]\nmodel = 'MODEL'\nkv = 'q8_0'\nrepetitions = 1\n");
    let said = stderr(&place.output("bench -p 4 -n 0 --vs nowhere/llama-bench"));
    assert!(
        said.contains("nowhere/llama-bench") && !said.contains("--kv"),
        "{said}"
    );
}

/// Another text than that of the file's JSON lines.
#[test]
fn a_field_of_json_lines_is_for_json_lines() {
    let place = Place::new(
        "[run]\nmodel = 'MODEL'\nn = 1\nprune = 0.2\nmethod = 'flap'\ncalib-tokens = 256\ncalib-field = 'body'\n",
    );
    let text = place
        .workshop
        .write("text.txt", "It was the best of days. ".repeat(40));
    place.succeed(&format!(
        "run -p x --no-baseline --calib {}",
        text.display()
    ));
    place.succeed("run -p x --no-baseline --calib self:300");
    let line = format!(
        "{{\"body\": \"{}\"}}\n",
        "It was the best of days. ".repeat(40)
    );
    let lines = place.workshop.write("text.jsonl", line);
    place.succeed(&format!(
        "run -p x --no-baseline --calib {}",
        lines.display()
    ));
}

// ---- what is wrong ----

#[test]
fn what_is_wrong_is_told_with_file_line_and_the_nearest_that_is_right() {
    for (config, words) in [
        (
            "threads = 2\n\n[run]\ntempp = 1\n",
            &["line 4", "tempp", "the nearest is temp"][..],
        ),
        (
            "[run]\ntop_k = 1\n",
            &["line 2", "top_k", "the nearest is top-k"],
        ),
        (
            "[serv]\ntemp = 1\n",
            &["line 1", "[serv]", "the nearest is [serve]"],
        ),
        (
            "[elsewhere]\ntemp = 1\n",
            &["line 1", "[elsewhere]", "perplexity"],
        ),
        (
            "thread = 2\n",
            &["line 1", "thread", "the nearest is threads"],
        ),
        (
            "[inspect]\nport = 2\n",
            &["line 2", "port", "it is one of serve"],
        ),
        ("[run]\nverbose = 1\n", &["line 2", "verbose"]),
        ("[run]\nhelp = true\n", &["line 2", "help"]),
        (
            "[completions]\nshell = 'bash'\n",
            &["line 1", "[completions]"],
        ),
        (
            "[run]\ntemp = true\n",
            &["line 2", "temp", "a number, and is true or false"],
        ),
        (
            "[run]\ntemp = 'warm'\n",
            &["line 2", "\"warm\"", "a number of at least 0"],
        ),
        ("[run]\ntemp = -1\n", &["line 2", "\"-1\"", "at least 0"]),
        ("[run]\ntemp = [1, 2]\n", &["line 2", "is a list"]),
        ("[run]\ntemp = 1979-05-27\n", &["line 2", "in quotes"]),
        (
            "[run]\nquiet = 1\n",
            &["line 2", "true or false, and is a number"],
        ),
        (
            "[run]\nquiet = 'yes'\n",
            &["line 2", "true or false, and is a text"],
        ),
        (
            "[run]\nstop = ['a', true]\n",
            &["line 2", "stop", "true or false"],
        ),
        ("[run]\nstop = ''\n", &["line 2", "stop"]),
        ("[run]\nkv = 'f8'\n", &["line 2", "\"f8\"", "f16, q8_0"]),
        ("[run.sampling]\ntemp = 1\n", &["line 1", "sampling"]),
        (
            "[run]\nprune = 0.3\nfit = '80MB'\n",
            &["line 3", "fit cannot be used with prune of line 2"],
        ),
        (
            "[run]\nprune = 0.3\nratio = 0.2\n",
            &["line 3", "ratio means the same as prune of line 2"],
        ),
        (
            "ctx = 2\n",
            &["line 1", "ctx", "flapjack perplexity", "at least 4"],
        ),
        ("temp = 1\ntemp = 2\n", &["line 2", "not TOML"]),
        ("temp = \n", &["line 1", "not TOML"]),
        ("temp 1\n", &["line 1", "not TOML"]),
    ] {
        let place = Place::new(config);
        let output = place.output("info");
        assert_eq!(output.status.code(), Some(2), "{config}");
        let said = stderr(&output);
        let file = place.file.to_str().unwrap();
        for word in words.iter().chain(&[file]) {
            assert!(said.contains(word), "{config}: {word} in {said}");
        }
    }
}

#[test]
fn a_file_that_is_named_must_be_there_and_be_text() {
    let place = Place::new("");
    let folder = place.workshop.path("");
    for named in ["/nowhere/config.toml", folder.to_str().unwrap()] {
        let output = place.with("info", &[("FLAPJACK_CONFIG", named)]);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        let said = stderr(&output);
        assert!(
            said.contains("cannot read the config file") && said.contains(named),
            "{said}"
        );
    }
    fs::write(&place.file, [b'#', 0xff, b'\n']).unwrap();
    let said = stderr(&place.output("info"));
    assert!(said.contains("cannot read the config file"), "{said}");
    place.workshop.write("config.toml", "");
    place.succeed("info");
}

#[test]
fn help_and_what_mends_a_file_work_whatever_is_in_it() {
    let place = Place::new("[rnu]\n");
    for arguments in [
        "--help",
        "run --help",
        "help run",
        "-V",
        "completions bash",
        "man",
        "config --path",
    ] {
        place.succeed(arguments);
    }
    assert!(place.refused("config").contains("[rnu]"));
    assert!(place.refused("run -p x -m MODEL").contains("[rnu]"));
    // What is wrong with the arguments is told without it.
    assert!(place.refused("run --tempp 1").contains("--temp"));
}

// ---- showing ----

#[test]
fn the_file_is_in_the_users_folder_and_its_settings_are_shown() {
    let place = Place::new(
        "# mine\nthreads = 1\n[serve]\nport = 9000\napi-key = 'secret'\n[run]\nstop = ['a', 'b']\n",
    );
    let text = place.succeed("config").0;
    let file = place.file.to_str().unwrap();
    assert!(text.starts_with(&format!("defaults of {file}\n  threads = 1\n  [serve]\n  port = 9000\n  api-key = …\n  [run]\n  stop = a, b\n")), "{text}");
    assert!(
        text.contains("FLAPJACK_CONFIG=") && !text.contains("secret"),
        "{text}"
    );
    assert_eq!(place.succeed("config --path").0, format!("{file}\n"));
    let log = place.succeed("run -v -p x -n 1 -m MODEL").1;
    assert!(
        log.contains(&format!("defaults of {file}: stop = a, b; threads = 1")),
        "{log}"
    );

    let output = place.with("config", &[("FLAPJACK_CONFIG", "")]);
    assert!(succeeded(&output).0.contains("there is no config file"));
    let output = place.with("config --path", &[("FLAPJACK_CONFIG", "")]);
    assert_eq!(succeeded(&output).0, "");
}

#[test]
#[cfg(target_os = "linux")]
fn without_the_variable_the_file_is_in_the_config_folder_and_need_not_be_there() {
    let place = Place::new("");
    let home = place.workshop.path("home");
    let program = |arguments: &[&str]| {
        let mut command = program();
        command.args(arguments).env_remove("FLAPJACK_CONFIG");
        command.env("XDG_CONFIG_HOME", &home);
        command.env("FLAPJACK_CACHE", place.workshop.path(""));
        succeeded(&run_with_input(command, b"")).0
    };
    let expected = home.join("flapjack/config.toml");
    assert_eq!(
        program(&["config", "--path"]),
        format!("{}\n", expected.display())
    );
    assert!(program(&["config"]).contains("there is no config file; it would be"));
    assert!(!program(&["models"]).starts_with('{'));
    place
        .workshop
        .write("home/flapjack/config.toml", "json = true");
    assert!(program(&["models"]).starts_with('{'));
}
