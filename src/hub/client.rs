//! Requests to the hub: its address, the token, proxies and certificates, redirects, and what its refusals mean.
//!
//! Every request runs on a thread of its own, so that whoever waits for it can be told so several times a second, and call it off.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use ureq::http::{HeaderMap, Method, Request, Uri};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body, Proxy};

use super::environment::Environment;
use super::errors::{ENDPOINT_VARIABLE, NameError, TOKEN_VARIABLE, is_passing};
use super::{HubError, Step, Steps, tell};

/// The hub that is asked unless another one is named.
const ENDPOINT: &str = "https://huggingface.co";
/// How often a request is made again that may succeed later.
const AGAIN: u32 = 3;
/// The longest that a server can ask to wait before that.
const LONGEST_PAUSE: Duration = Duration::from_secs(20);
/// What fails in less time than this is tried once more.
const SOON: Duration = Duration::from_secs(2);
/// How often whoever waits is told so.
const POLL: Duration = Duration::from_millis(100);
/// Redirects that are followed one behind the other.
const MOST_REDIRECTS: usize = 8;
/// The longest list of files that is read.
const LONGEST_LIST: u64 = 64 << 20;
/// Bytes of a file that are handed on at a time.
const CHUNK: usize = 256 << 10;

/// How the hub is reached.
#[derive(Debug, Clone)]
pub(super) struct Access {
    /// The address of the hub, without a slash at its end.
    pub endpoint: String,
    /// The token, and where it comes from.
    pub token: Option<(String, String)>,
    /// The proxy, with its variable and hosts that do without.
    proxy: Option<(&'static str, String, String)>,
    /// A file with certificates of authorities; `None` for the system's.
    certificates: Option<(&'static str, PathBuf)>,
    /// How long to wait for a connection.
    pub connect: Duration,
    /// How long to wait for an answer, or for more of it.
    pub answer: Duration,
    /// How long to wait before a request is made again, the first time. None is, if this is zero.
    pub pause: Duration,
}

impl Access {
    pub fn new(environment: &Environment, home: Option<&Path>) -> Self {
        let endpoint = environment.text(ENDPOINT_VARIABLE);
        let endpoint = endpoint.unwrap_or_else(|| ENDPOINT.to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let named = environment.first(&[TOKEN_VARIABLE, "HUGGING_FACE_HUB_TOKEN"]);
        let token = match named {
            Some((variable, token)) => Some((token, variable.to_owned())),
            None => {
                let file = environment.path("HF_TOKEN_PATH");
                let file = file.or_else(|| Some(home?.join("token")));
                file.and_then(|file| {
                    let token = std::fs::read_to_string(&file).ok()?.trim().to_owned();
                    (!token.is_empty()).then(|| (token, file.display().to_string()))
                })
            }
        };
        // As curl has it: in capitals for plain HTTP it is what servers get of a request's headers.
        let names: &[&str] = match endpoint.starts_with("http:") {
            true => &["http_proxy", "ALL_PROXY", "all_proxy"],
            false => &["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"],
        };
        let without = environment.first(&["NO_PROXY", "no_proxy"]);
        let without = without.map_or_else(String::new, |(_, hosts)| hosts);
        let proxy = environment.first(names);
        let files = ["SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE"];
        Self {
            endpoint,
            token,
            proxy: proxy.map(|(name, address)| (static_name(name), address, without)),
            certificates: files
                .into_iter()
                .find_map(|name| Some((name, environment.path(name)?))),
            connect: Duration::from_secs(10),
            answer: Duration::from_secs(30),
            pause: Duration::from_millis(500),
        }
    }

    /// Where a repository is looked at with a browser.
    pub fn page(&self, repository: &str) -> String {
        format!("{}/{repository}", self.endpoint)
    }

    /// Where a file of a repository is.
    pub fn file(&self, repository: &str, revision: &str, file: &str) -> String {
        let file = file.split('/').map(escaped).collect::<Vec<_>>().join("/");
        let revision = escaped(revision);
        format!("{}/{repository}/resolve/{revision}/{file}", self.endpoint)
    }
}

/// A proxy's variable, of those that there are.
fn static_name(name: &str) -> &'static str {
    match name {
        "http_proxy" => "http_proxy",
        "HTTPS_PROXY" => "HTTPS_PROXY",
        "https_proxy" => "https_proxy",
        "ALL_PROXY" => "ALL_PROXY",
        _ => "all_proxy",
    }
}

/// A part of a path as it stands in an address.
fn escaped(part: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
    let parts = part.bytes().map(|b| match plain(b) {
        true => char::from(b).to_string(),
        false => format!("%{b:02X}"),
    });
    parts.collect()
}

/// A client of one hub.
#[derive(Debug, Clone)]
pub(super) struct Client {
    agent: Agent,
    pub access: Access,
}

/// What came back, before its body is read.
pub(super) struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    body: Body,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// What a download hands over: first the head of the answer, then bytes, then how it ended.
pub(super) enum Piece {
    Head { status: u16, headers: HeaderMap },
    Bytes(Vec<u8>),
    End(Result<(), String>),
}

/// What was asked for, where it is refused.
pub(super) struct Asked<'a> {
    pub address: &'a str,
    pub repository: &'a str,
    pub revision: &'a str,
    /// `None` for the list of all files.
    pub file: Option<&'a str>,
}

/// What the hub says of a file.
#[derive(Debug, Clone)]
pub(super) struct FileHead {
    /// Its ETag, without what is around it: the SHA-256 of large files, git's hash of small ones.
    pub etag: String,
    pub size: Option<u64>,
}

impl Client {
    /// # Errors
    /// If the proxy or the certificates that variables name cannot be used.
    pub fn new(access: Access) -> Result<Self, NameError> {
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            // They are followed here, since their headers matter.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("flapjack/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(access.connect))
            .timeout_connect(Some(access.connect))
            .timeout_recv_response(Some(access.answer))
            .timeout_per_read(Some(access.answer))
            .proxy(proxy(access.proxy.as_ref())?);
        if access.endpoint.starts_with("https:") || access.certificates.is_some() {
            config = config.tls_config(tls(access.certificates.as_ref())?);
        }
        let is_address = ["http://", "https://"]
            .iter()
            .any(|scheme| access.endpoint.starts_with(scheme));
        if !is_address || origin(&access.endpoint).is_none() {
            return Err(NameError::Variable {
                variable: ENDPOINT_VARIABLE,
                value: access.endpoint,
                problem: "this is not the address of a hub, such as https://huggingface.co"
                    .to_owned(),
            });
        }
        Ok(Self {
            agent: config.build().into(),
            access,
        })
    }

    /// The names of all files of a repository at a revision, and its commit.
    ///
    /// # Errors
    /// If the hub cannot be reached, or refuses; [`HubError::Cancelled`].
    pub fn list(
        &self,
        repository: &str,
        revision: &str,
        steps: &mut Steps,
    ) -> Result<(String, Vec<String>), HubError> {
        let endpoint = &self.access.endpoint;
        let revision_part = escaped(revision);
        let address = format!("{endpoint}/api/models/{repository}/revision/{revision_part}");
        let (client, url) = (self.clone(), address.clone());
        let text = self.again(steps, move || {
            let mut answer = client.get(&url, &[])?;
            let body = answer.body.with_config().limit(LONGEST_LIST);
            let text = body.read_to_string().map_err(|error| {
                client.unreachable(&format!("the answer broke off: {}", words(&error)))
            })?;
            Ok((answer.status, answer.headers, text))
        })?;
        let (status, headers, text) = text;
        if status != 200 {
            let asked = Asked {
                address: &address,
                repository,
                revision,
                file: None,
            };
            return Err(self.refusal(status, &headers, &text, &asked).into());
        }
        let odd = |problem: &str| NameError::Odd {
            address: address.clone(),
            problem: problem.to_owned(),
        };
        let list: Value = serde_json::from_str(&text).map_err(|_| odd("it is not JSON"))?;
        let commit = list["sha"].as_str().unwrap_or_default();
        if !super::names::is_part(commit) {
            return Err(odd("it has no commit (\"sha\")").into());
        }
        let files = list["siblings"]
            .as_array()
            .ok_or_else(|| odd("it has no list of files (\"siblings\")"))?;
        let names = files.iter().filter_map(|file| file["rfilename"].as_str());
        let names = names.filter(|name| super::names::is_within(name));
        Ok((commit.to_owned(), names.map(str::to_owned).collect()))
    }

    /// What the hub says of a file, without fetching it.
    ///
    /// # Errors
    /// If the hub cannot be reached, or refuses; [`HubError::Cancelled`].
    pub fn look(
        &self,
        repository: &str,
        revision: &str,
        file: &str,
        steps: &mut Steps,
    ) -> Result<FileHead, HubError> {
        let address = self.access.file(repository, revision, file);
        let (client, url) = (self.clone(), address.clone());
        let (status, headers) = self.again(steps, move || client.head(&url))?;
        let linked = headers.contains_key("x-linked-etag");
        if !linked && !(200..300).contains(&status) {
            let asked = Asked {
                address: &address,
                repository,
                revision,
                file: Some(file),
            };
            return Err(self.refusal(status, &headers, "", &asked).into());
        }
        let text = |name: &str| headers.get(name)?.to_str().ok();
        let etag = text("x-linked-etag").or_else(|| text("etag"));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
        let size = text("x-linked-size").or_else(|| text("content-length").filter(|_| !linked));
        match etag {
            Some(etag) if super::names::is_part(etag) => Ok(FileHead {
                etag: etag.to_owned(),
                size: size.and_then(|size| size.parse().ok()),
            }),
            _ => Err(NameError::Odd {
                address,
                problem: "it does not tell the file's ETag".to_owned(),
            }
            .into()),
        }
    }

    /// Begins to fetch from an address. Bytes come as they arrive; nothing is made again here.
    pub fn fetch(&self, address: &str, headers: Vec<(&'static str, String)>) -> Receiver<Piece> {
        let (to, from) = mpsc::sync_channel(8);
        let (client, address) = (self.clone(), address.to_owned());
        let download = move || {
            let answer = match client.get(&address, &headers) {
                Ok(answer) => answer,
                Err(error) => {
                    let _ = to.send(Piece::End(Err(error.to_string())));
                    return;
                }
            };
            let (status, headers) = (answer.status, answer.headers);
            if to.send(Piece::Head { status, headers }).is_err() {
                return;
            }
            let mut body = answer.body.into_reader();
            loop {
                let mut bytes = vec![0; CHUNK];
                let piece = match body.read(&mut bytes) {
                    Ok(0) => Piece::End(Ok(())),
                    Ok(count) => {
                        bytes.truncate(count);
                        Piece::Bytes(bytes)
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(error) => Piece::End(Err(error.to_string())),
                };
                let is_end = matches!(piece, Piece::End(_));
                // Nobody listens any more where it was called off.
                if to.send(piece).is_err() || is_end {
                    return;
                }
            }
        };
        // Without a thread the channel ends at once, which reads like a download that broke off.
        if let Err(error) = thread::Builder::new().spawn(download) {
            tracing::debug!("no thread for a download: {error}");
        }
        from
    }

    /// Follows redirects to the end. The token goes to the hub alone.
    fn get(&self, address: &str, headers: &[(&str, String)]) -> Result<Answer, NameError> {
        let mut address = address.to_owned();
        for _ in 0..MOST_REDIRECTS {
            let answer = self.one(Method::GET, &address, headers)?;
            match redirect(&address, &answer) {
                Some(next) => address = next,
                None => return Ok(answer),
            }
        }
        Err(self.unreachable("it redirects again and again"))
    }

    /// The status and headers of an address. Redirects within the hub are followed; one to another host says of the file what is to
    /// be known.
    fn head(&self, address: &str) -> Result<(u16, HeaderMap), NameError> {
        let mut address = address.to_owned();
        for _ in 0..MOST_REDIRECTS {
            let identity = [("accept-encoding", "identity".to_owned())];
            let answer = self.one(Method::HEAD, &address, &identity)?;
            match redirect(&address, &answer) {
                Some(next)
                    if self.is_hub(&next) && !answer.headers.contains_key("x-linked-size") =>
                {
                    address = next;
                }
                _ => return Ok((answer.status, answer.headers)),
            }
        }
        Err(self.unreachable("it redirects again and again"))
    }

    fn one(
        &self,
        method: Method,
        address: &str,
        headers: &[(&str, String)],
    ) -> Result<Answer, NameError> {
        let mut request = Request::builder().method(method).uri(address);
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        if let Some((token, _)) = &self.access.token
            && self.is_hub(address)
        {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(()).map_err(|_| match &self.access.token {
            Some((token, origin)) if token.chars().any(|c| c.is_control()) => NameError::Token {
                endpoint: self.access.endpoint.clone(),
                origin: origin.clone(),
            },
            _ => self.unreachable(&format!("{address:?} is no address")),
        })?;
        tracing::debug!("{} {address}", request.method());
        let answer = self.agent.run(request);
        let answer = answer.map_err(|error| match self.is_hub(address) {
            true => self.unreachable(&words(&error)),
            false => self.unreachable(&format!("{address}: {}", words(&error))),
        })?;
        let (parts, body) = answer.into_parts();
        Ok(Answer {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body,
        })
    }

    /// Whether an address is the hub's own: the same scheme, host and port.
    fn is_hub(&self, address: &str) -> bool {
        match (origin(address), origin(&self.access.endpoint)) {
            (Some(one), Some(other)) => one == other,
            _ => false,
        }
    }

    pub fn unreachable(&self, problem: &str) -> NameError {
        NameError::Unreachable {
            endpoint: self.access.endpoint.clone(),
            problem: problem.to_owned(),
        }
    }

    /// Does something on another thread, again where the answer is one that may be another later.
    fn again<T: Passing + Send + 'static>(
        &self,
        steps: &mut Steps,
        work: impl Fn() -> Result<T, NameError> + Send + Clone + 'static,
    ) -> Result<T, HubError> {
        let most = match self.access.pause.is_zero() {
            true => 0,
            false => AGAIN,
        };
        for failures in 0.. {
            let begun = Instant::now();
            let (to, from) = mpsc::sync_channel(1);
            let work = work.clone();
            let run = move || {
                let _ = to.send(work());
            };
            thread::Builder::new()
                .spawn(run)
                .map_err(|error| self.unreachable(&error.to_string()))?;
            let found = loop {
                match from.recv_timeout(POLL) {
                    Ok(found) => break found,
                    Err(RecvTimeoutError::Timeout) => tell(steps, Step::Checking)?,
                    Err(RecvTimeoutError::Disconnected) => {
                        break Err(self.unreachable("the request ended without an answer"));
                    }
                }
            };
            tell(steps, Step::Checking)?;
            let headers = match &found {
                Ok(answer) if is_passing(answer.status()) => answer.headers(),
                // A connection that broke off; but nobody waits a second time for one that does not come.
                Err(NameError::Unreachable { .. }) if failures == 0 && begun.elapsed() < SOON => {
                    None
                }
                _ => return Ok(found?),
            };
            if failures >= most {
                return Ok(found?);
            }
            self.pause(failures, headers, Step::Checking, steps)?;
        }
        unreachable!("the last answer is returned")
    }

    /// Waits before something is tried again, longer each time, or as long as the server asks for.
    pub fn pause(
        &self,
        failures: u32,
        headers: Option<&HeaderMap>,
        step: Step,
        steps: &mut Steps,
    ) -> Result<(), HubError> {
        let asked = headers
            .and_then(|headers| headers.get("retry-after")?.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        let own = self.access.pause * 2_u32.pow(failures.min(6));
        let mut left = asked.unwrap_or(own).min(LONGEST_PAUSE);
        while !left.is_zero() {
            let now = left.min(POLL);
            thread::sleep(now);
            left -= now;
            tell(steps, step)?;
        }
        Ok(())
    }

    /// What a status that is no success means.
    pub fn refusal(
        &self,
        status: u16,
        headers: &HeaderMap,
        body: &str,
        asked: &Asked,
    ) -> NameError {
        let Asked {
            address,
            repository,
            revision,
            file,
        } = *asked;
        let words = refusal_words(headers, body);
        let code = headers.get("x-error-code").and_then(|c| c.to_str().ok());
        let repository = repository.to_owned();
        let token = self.access.token.as_ref();
        let with_token = token.is_some();
        match (status, code, file) {
            (_, Some("GatedRepo"), _) | (403, None, _) => NameError::Gated {
                page: self.access.page(&repository),
                repository,
                with_token,
            },
            (_, Some("RevisionNotFound"), _) => NameError::NoRevision {
                repository,
                revision: revision.to_owned(),
            },
            (404, Some("EntryNotFound") | None, Some(file)) => NameError::NoFile {
                repository,
                file: file.to_owned(),
                there: Vec::new(),
            },
            (401, _, _) if words.to_ascii_lowercase().contains("invalid") && with_token => {
                NameError::Token {
                    endpoint: self.access.endpoint.clone(),
                    origin: token.map(|(_, origin)| origin.clone()).unwrap_or_default(),
                }
            }
            (404, None, None) if words.to_ascii_lowercase().contains("revision") => {
                NameError::NoRevision {
                    repository,
                    revision: revision.to_owned(),
                }
            }
            (401 | 404, _, _) | (_, Some("RepoNotFound"), _) => NameError::NoRepository {
                repository,
                endpoint: self.access.endpoint.clone(),
                with_token,
            },
            _ => NameError::Answer {
                address: address.to_owned(),
                status,
                words,
            },
        }
    }
}

/// An answer that may be another one later.
trait Passing {
    fn status(&self) -> u16;
    fn headers(&self) -> Option<&HeaderMap>;
}

impl Passing for (u16, HeaderMap) {
    fn status(&self) -> u16 {
        self.0
    }

    fn headers(&self) -> Option<&HeaderMap> {
        Some(&self.1)
    }
}

impl Passing for (u16, HeaderMap, String) {
    fn status(&self) -> u16 {
        self.0
    }

    fn headers(&self) -> Option<&HeaderMap> {
        Some(&self.1)
    }
}

/// What a server says about a refusal, at most a line of it.
fn refusal_words(headers: &HeaderMap, body: &str) -> String {
    let header = headers.get("x-error-message").and_then(|w| w.to_str().ok());
    let json: Option<Value> = serde_json::from_str(body).ok();
    let error = json.as_ref().and_then(|json| json["error"].as_str());
    let words = header.or(error).unwrap_or_default();
    words
        .lines()
        .next()
        .unwrap_or_default()
        .chars()
        .take(200)
        .collect()
}

/// Where an answer redirects to; `None` if it does not.
fn redirect(from: &str, answer: &Answer) -> Option<String> {
    if !matches!(answer.status, 301 | 302 | 303 | 307 | 308) {
        return None;
    }
    let to = answer.header("location")?;
    if to.contains("://") {
        return Some(to.to_owned());
    }
    let (scheme, rest) = from.split_once("://")?;
    if to.starts_with("//") {
        return Some(format!("{scheme}:{to}"));
    }
    let host_end = rest.find('/').unwrap_or(rest.len());
    let (host, path) = rest.split_at(host_end);
    Some(match to.starts_with('/') {
        true => format!("{scheme}://{host}{to}"),
        false => {
            let path = path.split('?').next().unwrap_or_default();
            let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
            format!("{scheme}://{host}{folder}/{to}")
        }
    })
}

/// Scheme, host and port of an address.
fn origin(address: &str) -> Option<(String, String, u16)> {
    let uri: Uri = address.parse().ok()?;
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let port = uri.port_u16().unwrap_or(match &*scheme {
        "https" => 443,
        _ => 80,
    });
    Some((scheme, uri.host()?.to_ascii_lowercase(), port))
}

/// What went wrong with a request, in words.
fn words(error: &ureq::Error) -> String {
    match error {
        ureq::Error::HostNotFound => "there is no such host, or no network".to_owned(),
        ureq::Error::Io(error) => {
            let words = error.to_string();
            match words.contains("certificate") {
                true => format!("{words} (SSL_CERT_FILE can name a file with that authority's)"),
                false => words,
            }
        }
        ureq::Error::Timeout(what) => format!("it took too long ({what})"),
        ureq::Error::Rustls(error) => format!("the connection is not safe: {error}"),
        ureq::Error::ConnectProxyFailed(words) => format!("the proxy refuses: {words}"),
        error => error.to_string(),
    }
}

/// The proxy as it is to be used. Hosts that do without are named as curl has it: `example.org` stands for all below it too.
fn proxy(named: Option<&(&'static str, String, String)>) -> Result<Option<Proxy>, NameError> {
    let Some((variable, address, without)) = named else {
        return Ok(None);
    };
    let wrong = |problem: &str| NameError::Variable {
        variable,
        // There may be a password in it.
        value: match address.rsplit_once('@') {
            Some((_, host)) => format!("…@{host}"),
            None => address.clone(),
        },
        problem: problem.to_owned(),
    };
    if address.starts_with("socks") {
        return Err(wrong(
            "proxies of this kind are not supported, only those of HTTP",
        ));
    }
    let no_proxy = |_| wrong("this is not the address of a proxy, such as http://localhost:3128");
    let plain = Proxy::new(address).map_err(no_proxy)?;
    let mut proxy = Proxy::builder(plain.protocol())
        .host(plain.host())
        .port(plain.port());
    if let Some(name) = plain.username() {
        proxy = proxy.username(name);
    }
    if let Some(password) = plain.password() {
        proxy = proxy.password(password);
    }
    let hosts = without.split([',', ' ']).map(str::trim);
    for host in hosts.filter(|host| !host.is_empty()) {
        proxy = proxy.no_proxy(host);
        if !host.starts_with(['.', '*']) {
            proxy = proxy.no_proxy(&format!(".{host}"));
        } else if let Some(whole) = host.strip_prefix('.') {
            proxy = proxy.no_proxy(whole);
        }
    }
    proxy.build().map(Some).map_err(no_proxy)
}

/// Certificates of a file, or the system's; Mozilla's where the system has none.
fn tls(named: Option<&(&'static str, PathBuf)>) -> Result<TlsConfig, NameError> {
    let found = match named {
        Some((_, file)) => rustls_native_certs::load_certs_from_paths(Some(file), None),
        None => rustls_native_certs::load_native_certs(),
    };
    let certificates: Vec<Certificate<'static>> = found
        .certs
        .iter()
        .map(|certificate| Certificate::from_der(certificate).to_owned())
        .collect();
    let roots = match (certificates.is_empty(), named) {
        (false, _) => RootCerts::new_with_certs(&certificates),
        (true, None) => RootCerts::WebPki,
        (true, Some((variable, file))) => {
            let error = found.errors.first();
            return Err(NameError::Variable {
                variable,
                value: file.display().to_string(),
                problem: match error {
                    Some(error) => format!("there are no certificates to be had from it: {error}"),
                    None => "there are no certificates in it".to_owned(),
                },
            });
        }
    };
    Ok(TlsConfig::builder().root_certs(roots).build())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_are_those_that_curl_would_take() {
        let access = |endpoint: &str, variables: &[(&str, &str)]| {
            let mut environment = Environment::new("/home/me", [(ENDPOINT_VARIABLE, endpoint)]);
            for (name, value) in variables {
                environment = environment.with(name, *value);
            }
            Access::new(&environment, None)
        };
        let all = [
            ("HTTP_PROXY", "http://capitals:1"),
            ("http_proxy", "http://plain:1"),
            ("HTTPS_PROXY", "http://me:secret@safe:2"),
            ("ALL_PROXY", "all:3"),
            ("NO_PROXY", "localhost, example.org,.test"),
        ];
        let taken = |endpoint: &str, variables: &[(&str, &str)]| {
            let access = access(endpoint, variables);
            proxy(access.proxy.as_ref()).expect("a proxy")
        };
        let of = |endpoint: &str, variables: &[(&str, &str)]| {
            let proxy = taken(endpoint, variables)?;
            Some((proxy.host().to_owned(), proxy.port()))
        };
        let some = |host: &str, port| Some((host.to_owned(), port));
        assert_eq!(of("https://hub", &all), some("safe", 2));
        assert_eq!(of("http://hub", &all), some("plain", 1));
        assert_eq!(of("http://hub", &all[..1]), None);
        assert_eq!(of("https://hub", &all[3..]), some("all", 3));
        assert_eq!(of("https://hub", &[]), None);
        let proxy = taken("https://hub", &all).expect("a proxy");
        assert_eq!(
            (proxy.username(), proxy.password()),
            (Some("me"), Some("secret"))
        );
        for (address, without) in [
            ("https://hub/", false),
            ("https://localhost/", true),
            ("https://example.org/", true),
            ("https://www.example.org/", true),
            ("https://myexample.org/", false),
            ("https://a.test/", true),
        ] {
            let address: Uri = address.parse().expect("an address");
            assert_eq!(proxy.is_no_proxy(&address), without, "{address}");
        }
        for (value, words) in [
            ("socks5://x:1", "HTTP"),
            ("http://:x@", "address of a proxy"),
        ] {
            let access = access("https://hub", &[("HTTPS_PROXY", value)]);
            let error = Client::new(access).expect_err(value).to_string();
            assert!(
                error.starts_with("HTTPS_PROXY=") && error.contains(words),
                "{error}"
            );
        }
    }

    #[test]
    fn certificates_that_are_named_must_be_there() {
        let environment = Environment::new("/", [("SSL_CERT_FILE", "/nowhere/certificates.pem")]);
        let error = Client::new(Access::new(&environment, None)).expect_err("no file");
        assert!(
            error.to_string().starts_with("SSL_CERT_FILE=/nowhere"),
            "{error}"
        );
    }

    #[test]
    fn a_redirect_may_be_relative() {
        let answer = |location: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("location", location.parse().expect("a header"));
            Answer {
                status: 302,
                headers,
                body: Body::builder().data(""),
            }
        };
        for (to, expected) in [
            ("https://cdn/x?y", "https://cdn/x?y"),
            ("//cdn/x", "http://cdn/x"),
            ("/x", "http://hub:80/x"),
            ("x", "http://hub:80/a/x"),
        ] {
            let found = redirect("http://hub:80/a/b?c=/", &answer(to));
            assert_eq!(found.as_deref(), Some(expected), "{to}");
        }
        assert_eq!(origin("http://hub/a"), origin("HTTP://HUB:80"));
        assert_ne!(origin("http://hub/a"), origin("https://hub/a"));
    }
}
