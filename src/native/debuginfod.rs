//! [`Debuginfod`]: debugging information by build id from HTTP servers (`debuginfod(8)`), and the cache that all its clients share.
//!
//! Nobody is asked unless `DEBUGINFOD_URLS` says whom. A server that can't be reached is asked once; what comes is used only if it has the
//! build id that was asked for. `curl` does the asking: a program that runs as root has no need of TLS of its own. Knows no symbols.

use crate::image::elf::ElfFile;
use std::cell::RefCell;
use std::collections::HashSet;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::NamedTempFile;

/// How long a server may take, where `DEBUGINFOD_TIMEOUT` does not say.
const TIMEOUT: Duration = Duration::from_secs(90);
/// How long it is believed that no server has something (elfutils' `cache_miss_s`).
const MISS: Duration = Duration::from_secs(600);
/// The largest file that is taken: larger ones are none that could be read.
const MOST_BYTES: u64 = 4 << 30;

/// See the module.
pub(super) struct Debuginfod {
    urls: Vec<String>,
    cache: PathBuf,
    timeout: Option<Duration>,
    /// Those that could not be reached.
    down: RefCell<HashSet<String>>,
}

impl Debuginfod {
    /// As the environment says; `None` if it names no server.
    pub(super) fn from_environment() -> Option<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let urls = variable("DEBUGINFOD_URLS")?;
        // No number: the default; none or less: no limit.
        let seconds = variable("DEBUGINFOD_TIMEOUT").and_then(|text| text.trim().parse::<i64>().ok());
        let timeout = match seconds.map(u64::try_from) {
            None => Some(TIMEOUT),
            Some(Ok(seconds @ 1..)) => Some(Duration::from_secs(seconds)),
            Some(_) => None,
        };
        let folder = |name| variable(name).map(PathBuf::from);
        let cache = folder("DEBUGINFOD_CACHE_PATH").or_else(|| {
            let home = folder("HOME");
            let old =
                home.clone().map(|home| home.join(".debuginfod_client_cache")).filter(|old| old.is_dir());
            let caches = folder("XDG_CACHE_HOME").or_else(|| home.map(|home| home.join(".cache")));
            old.or_else(|| caches.map(|caches| caches.join("debuginfod_client")))
        })?;
        Self::new(&urls, cache, timeout)
    }

    /// Servers from a list with blanks; `None` if there is no URL in it.
    pub(super) fn new(urls: &str, cache: PathBuf, timeout: Option<Duration>) -> Option<Self> {
        // Between them may stand words for policies, such as `ima:enforcing`.
        let is_url = |word: &&str| word.starts_with("http://") || word.starts_with("https://");
        let urls: Vec<String> =
            urls.split_whitespace().filter(is_url).map(|url| url.trim_end_matches('/').to_owned()).collect();
        (!urls.is_empty()).then_some(Self { urls, cache, timeout, down: RefCell::default() })
    }

    /// The file with the debugging information of a build id.
    pub(super) fn find(&self, build_id: &str) -> Option<ElfFile> {
        let is_id = build_id.len() >= 4 && build_id.bytes().all(|byte| byte.is_ascii_hexdigit());
        let folder = self.cache.join(build_id);
        let cached = folder.join("debuginfo");
        if !is_id || is_missed(&cached) {
            return None;
        }
        if let Some(file) = with_build_id(&cached, build_id) {
            return Some(file);
        }
        let mut is_certain = true;
        for url in &self.urls {
            if self.down.borrow().contains(url) {
                is_certain = false;
                continue;
            }
            match self.ask(url, build_id, &folder) {
                Ok(Some(file)) => return Some(file),
                Ok(None) => {}
                Err(why) => {
                    is_certain = false;
                    tracing::warn!("no debugging information from {url}: {why}");
                }
            }
        }
        if is_certain {
            note_miss(&cached);
        }
        None
    }

    /// What a server has; an error says why it may have something and did not give it.
    fn ask(&self, url: &str, build_id: &str, folder: &Path) -> Result<Option<ElfFile>, String> {
        tracing::info!("asking {url} for the debugging information of {build_id}");
        let base = if url.ends_with("/buildid") { url.to_owned() } else { format!("{url}/buildid") };
        let file = new_file(&self.cache).map_err(|error| error.to_string())?;
        let mut curl = Command::new("curl");
        // First: its own settings are another program's.
        curl.arg("-q").args(["--silent", "--show-error", "--location", "--proto", "=http,https"]);
        curl.args([
            "--user-agent",
            concat!("heaptap/", env!("CARGO_PKG_VERSION")),
            "--write-out",
            "%{http_code}",
        ]);
        curl.args(["--max-filesize", &MOST_BYTES.to_string(), "--output"]).arg(file.path());
        if let Some(timeout) = self.timeout.map(|timeout| timeout.as_secs().max(1).to_string()) {
            // Nothing for so long is too long, however long the whole takes.
            curl.args(["--connect-timeout", &timeout, "--speed-limit", "1", "--speed-time", &timeout]);
        }
        let said = curl.arg("--").arg(format!("{base}/{build_id}/debuginfo")).output();
        let said = said.map_err(|error| format!("curl, which asks, cannot be run: {error}"))?;
        let status = String::from_utf8_lossy(&said.stdout);
        match (said.status.success(), status.trim()) {
            (true, "200") => {}
            (true, "404") => return Ok(None),
            (true, status) => return Err(format!("it said {status}")),
            (false, _) => {
                self.down.borrow_mut().insert(url.to_owned());
                let why = String::from_utf8_lossy(&said.stderr);
                return Err(format!("{}; it is not asked again", why.trim()));
            }
        }
        let path = folder.join("debuginfo");
        let kept = fs::create_dir_all(folder).and_then(|()| Ok(file.persist(&path)?));
        kept.map_err(|error| error.to_string())?;
        let file = with_build_id(&path, build_id);
        if file.is_none() {
            let _ = fs::remove_file(path);
            return Err(format!("what it sent is not that of {build_id}"));
        }
        Ok(file)
    }
}

/// A file in the cache that is gone unless it is kept.
fn new_file(folder: &Path) -> io::Result<NamedTempFile> {
    fs::create_dir_all(folder)?;
    tempfile::Builder::new().prefix("debuginfo.").tempfile_in(folder)
}

fn with_build_id(path: &Path, build_id: &str) -> Option<ElfFile> {
    let file = ElfFile::new(File::open(path).ok()?, path).ok()?;
    (file.build_id().as_deref() == Some(build_id)).then_some(file)
}

/// Whether it is known that nobody has it: an empty file that may not be read, as elfutils makes them.
fn is_missed(cached: &Path) -> bool {
    let Ok(metadata) = fs::metadata(cached) else { return false };
    let age = metadata.modified().ok().and_then(|time| time.elapsed().ok());
    metadata.len() == 0 && age.is_none_or(|age| age < MISS)
}

fn note_miss(cached: &Path) {
    let made = cached.parent().map(fs::create_dir_all);
    if made.is_some_and(|made| made.is_ok()) && fs::write(cached, "").is_ok() {
        let _ = fs::set_permissions(cached, Permissions::from_mode(0o000));
    }
}
