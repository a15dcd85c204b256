//! The chat in a real terminal: tmux, typed at and read as people do.
#![cfg(unix)]

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::common::{default_model, skip};

const PATIENCE: Duration = Duration::from_secs(120);

/// A program in a terminal of a tmux server of its own.
struct Terminal {
    socket: String,
    folder: TempDir,
}

impl Terminal {
    /// `None`, after noting a skip, where there is no tmux.
    ///
    /// # Panics
    /// On a machine that checks commits: `.ci/setup checks` installs it there.
    fn run(arguments: &[&str]) -> Option<Self> {
        if Command::new("tmux").arg("-V").output().is_err() {
            assert!(
                std::env::var_os("CI").is_none(),
                "there is no tmux; .ci/setup checks installs it"
            );
            skip("there is no tmux; .ci/setup checks installs it");
            return None;
        }
        default_model();
        let folder = tempfile::tempdir().unwrap();
        let terminal = Self {
            socket: folder.path().join("socket").to_str().unwrap().to_owned(),
            folder,
        };
        let state = format!("XDG_STATE_HOME={}", terminal.path(""));
        let status = terminal.path("status");
        // What the program leaves with is written down; tmux itself does not always know. Ctrl-C is for the program alone.
        let script = "trap : INT; status=$1; shift; \"$@\"; echo $? >\"$status\"; sleep 600";
        let mut command = vec![
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-x",
            "90",
            "-y",
            "30",
            "--",
        ];
        command.extend(["sh", "-c", script, "sh", &status]);
        // The history of whoever runs the tests is left alone.
        command.extend(["env", &state, env!("CARGO_BIN_EXE_flapjack")]);
        command.extend(arguments);
        terminal.tmux(&command);
        Some(terminal)
    }

    fn tmux(&self, arguments: &[&str]) -> Output {
        let output = Command::new("tmux")
            .args(["-S", &self.socket])
            .args(arguments)
            .output()
            .expect("tmux starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "tmux {arguments:?}: {said}");
        output
    }

    /// All that was on the screen so far, with lines that it wraps joined.
    fn screen(&self) -> String {
        let shown = self.tmux(&["capture-pane", "-p", "-J", "-S", "-"]);
        String::from_utf8(shown.stdout).unwrap()
    }

    /// Waits until the screen is as wanted, and returns it.
    fn wait(&self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let begin = Instant::now();
        loop {
            let screen = self.screen();
            if wanted(&screen) {
                return screen;
            }
            assert!(begin.elapsed() < PATIENCE, "{what} never comes:\n{screen}");
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Types a line.
    fn line(&self, text: &str) {
        self.tmux(&["send-keys", "-l", text]);
        self.tmux(&["send-keys", "Enter"]);
    }

    fn key(&self, key: &str) {
        self.tmux(&["send-keys", key]);
    }

    /// Waits until so many answers are there and the next message can be typed.
    fn answers(&self, count: usize) -> String {
        self.wait(&format!("answer {count}"), |screen| {
            screen.matches("tokens/s]").count() == count && is_waiting(screen)
        })
    }

    /// Waits for what a command says.
    fn said(&self, words: &str) -> String {
        self.wait(words, |screen| screen.contains(words) && is_waiting(screen))
    }

    /// Where a file of its folder is.
    fn path(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        path.to_str().unwrap().to_owned()
    }

    /// The code that the program left with.
    fn end(&self) -> i32 {
        let begin = Instant::now();
        loop {
            let status = std::fs::read_to_string(self.path("status")).unwrap_or_default();
            if let Some(status) = status.strip_suffix('\n') {
                return status.parse().unwrap();
            }
            assert!(
                begin.elapsed() < PATIENCE,
                "it does not leave: {}",
                self.screen()
            );
            std::thread::sleep(Duration::from_millis(30));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = Command::new("tmux")
            .args(["-S", &self.socket, "kill-server"])
            .output();
    }
}

/// Whether the last line is the prompt, with nothing behind it.
fn is_waiting(screen: &str) -> bool {
    screen.trim_end().ends_with("\n>")
}

#[test]
fn one_talks_stops_an_answer_begins_anew_and_leaves() {
    let Some(terminal) = Terminal::run(&["run", "--temp", "0"]) else {
        return;
    };
    terminal.said("/help lists commands, Ctrl-D leaves");
    terminal.line("What is the capital of France?");
    let first = terminal.answers(1);
    assert!(first.contains("Paris"), "{first}");
    terminal.line("And what is the capital of Italy?");
    terminal.answers(2);
    terminal.line("/stats");
    terminal.said("conversation: 4 messages");

    // Ctrl-C ends the answer, and not the program.
    terminal.line("Write a very long story about a lighthouse.");
    terminal.wait("the beginning of an answer", |screen| {
        let answer = screen.rsplit_once("a lighthouse.\n");
        answer.is_some_and(|(_, answer)| answer.trim().len() > 40)
    });
    terminal.key("C-c");
    let stopped = terminal.answers(3);
    let tokens = stopped
        .rsplit_once('[')
        .unwrap()
        .1
        .split(' ')
        .next()
        .unwrap();
    assert!((1..400).contains(&tokens.parse().unwrap()), "{stopped}");
    terminal.line("/stats");
    terminal.said("conversation: 6 messages");

    // On an empty line it says how to leave.
    terminal.key("C-c");
    terminal.said("(Ctrl-D leaves)");
    terminal.line("/help");
    let help = terminal.said("/reset           forget what was said");
    assert!(help.contains("Ctrl-C stops an answer"), "{help}");
    terminal.line("/reset");
    terminal.said("forgotten");
    terminal.line("/stats");
    terminal.said("conversation: 0 messages; 0 of ");

    // The arrow brings the last line back; it is no message.
    terminal.key("Up");
    terminal.wait("the last line", |screen| {
        screen.trim_end().ends_with("\n> /stats")
    });
    terminal.key("C-u");
    terminal.wait("an empty line", is_waiting);
    terminal.line("What is the capital of France?");
    let again = terminal.answers(4);
    let answer = |screen: &str| {
        let at = screen.rfind("> What is the capital of France?").unwrap();
        let lines = screen[at..].lines().skip(1);
        lines
            .take_while(|line| !line.starts_with('['))
            .collect::<Vec<_>>()
            .join("\n")
    };
    assert_eq!(answer(&again), answer(&first), "nothing of before is left");
    terminal.key("C-d");
    assert_eq!(terminal.end(), 0);
    let history = std::fs::read_to_string(terminal.path("flapjack/history")).unwrap();
    assert!(history.contains("lighthouse"), "{history}");
}

/// Text of several lines that is pasted is one message, as is what stands between two fences; a line that is typed while an answer is
/// made is the next message.
#[test]
fn a_message_may_have_lines_and_come_early() {
    let Some(terminal) = Terminal::run(&["run", "--temp", "0", "-n", "60"]) else {
        return;
    };
    terminal.said("/help lists commands");
    terminal.tmux(&[
        "set-buffer",
        "Answer in one word.\nWhat is the capital of France?",
    ]);
    terminal.tmux(&["paste-buffer", "-p"]);
    terminal.wait("what was pasted", |screen| {
        screen.trim_end().ends_with("of France?")
    });
    terminal.key("Enter");
    terminal.answers(1);
    for line in [
        "\"\"\"",
        "Answer in one word.",
        "What is the capital of Italy?",
    ] {
        terminal.line(line);
        terminal.wait("room for another line", |screen| {
            screen.trim_end().ends_with(&format!("{line}\n…"))
        });
    }
    terminal.line("\"\"\"");
    terminal.answers(2);
    terminal.line("Write a very long story about a lighthouse.");
    terminal.wait("the beginning of an answer", |screen| {
        let answer = screen.rsplit_once("a lighthouse.\n");
        answer.is_some_and(|(_, answer)| !answer.trim().is_empty())
    });
    terminal.line("Say hello.");
    terminal.answers(4);
    terminal.line("/stats");
    terminal.said("conversation: 8 messages");
    terminal.line("/exit");
    assert_eq!(terminal.end(), 0);
}
