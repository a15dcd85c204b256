//! Packages of Python that tests compare with. `.ci/clients` installs them; without them those tests are skipped.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

use super::program::{stderr, stdout};
use super::skip;

/// The Python that has them; `None`, after noting a skip, where they could not be installed.
///
/// # Panics
/// On a machine that checks commits, if `.ci/clients` was not run: then nothing may be passed over in silence.
pub fn python() -> Option<PathBuf> {
    let wanted = include_bytes!("../../clients/requirements.txt");
    let sum: String = Sha256::digest(wanted)
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = || {
        let home = || variable("HOME").unwrap_or_default().join(".cache");
        let cache = variable("XDG_CACHE_HOME").unwrap_or_else(home);
        cache.join("flapjack-clients")
    };
    let folder = variable("FLAPJACK_CLIENTS").unwrap_or_else(cache).join(sum);
    if folder.join("complete").exists() {
        return Some(folder.join("venv/bin/python"));
    }
    let why = std::fs::read_to_string(folder.join("missing"));
    assert!(
        std::env::var_os("CI").is_none() || why.is_ok(),
        "no clients in {}; .ci/clients installs them",
        folder.display()
    );
    let why = why.unwrap_or_else(|_| ".ci/clients was not run".to_owned());
    skip(&format!("no other clients: {}", why.trim()));
    None
}

/// Runs a script of `tests/clients`, which must succeed, and returns what it prints.
pub fn run(script: &str, arguments: &[&str]) -> Option<String> {
    let python = python()?;
    let folder = tempfile::tempdir().unwrap();
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    let output = Command::new(python)
        .arg(path.join(script))
        .args(arguments)
        // Nothing is looked for elsewhere, and what data sets are turned into is not kept.
        .env("HF_HOME", folder.path())
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_DATASETS_OFFLINE", "1")
        .env("NO_PROXY", "127.0.0.1")
        .stdin(Stdio::null())
        .output()
        .expect("Python starts");
    let printed = stdout(&output);
    assert!(
        output.status.success(),
        "{script}: {printed}\n{}",
        stderr(&output)
    );
    Some(printed)
}
