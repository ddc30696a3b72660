//! The control socket: how another heaptap asks the one that records a process for a snapshot.
//!
//! A Unix socket named by the target's pid, in a folder of the recording user's alone. One line is asked, one line of JSON is
//! answered. The recorder never waits for anybody here. Who may ask: the same user, and root.

use crate::inferior::sys;
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const REQUEST: &[u8] = b"snapshot\n";
/// Who has connected and not asked by then is let go.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections at a time.
const MOST_CLIENTS: usize = 8;
/// How long the one who asks waits: a snapshot of very much takes a while, and a file may have to be rewritten for it.
const ANSWER_WITHIN: Duration = Duration::from_secs(120);

/// A snapshot that was taken for someone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// Its index.
    pub index: u32,
    /// When: wall clock, nanoseconds since 1970 UTC.
    pub unix_ns: u64,
    /// Bytes live.
    pub live_bytes: u64,
    /// The capture.
    pub file: PathBuf,
}

/// A snapshot could not be asked for.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error("no heaptap takes snapshots of process {pid}")]
    Nobody {
        /// The target.
        pid: i32,
    },
    /// The socket is not for us.
    #[error("the heaptap that records process {pid} can't be asked: {source}")]
    Unreachable {
        /// The target.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// It gave no answer that makes sense.
    #[error("the heaptap that records process {pid} gave no answer: {why}")]
    NoAnswer {
        /// The target.
        pid: i32,
        /// Why not.
        why: String,
    },
    /// It was asked and could not.
    #[error("the heaptap that records process {pid} could not take a snapshot: {why}")]
    Refused {
        /// The target.
        pid: i32,
        /// Why not.
        why: String,
    },
}

/// The recorder's end. Its socket goes when it is dropped.
pub struct Control {
    listener: UnixListener,
    path: PathBuf,
    clients: Vec<Client>,
}

struct Client {
    stream: UnixStream,
    since: Instant,
    heard: Vec<u8>,
}

impl Control {
    /// Listens for requests about process `pid`. A socket of a heaptap that was killed is replaced.
    pub fn listen(pid: i32) -> io::Result<Self> {
        Self::listen_in(&own_folder()?, pid)
    }

    fn listen_in(folder: &Path, pid: i32) -> io::Result<Self> {
        let path = socket(folder, pid);
        let listener = match UnixListener::bind(&path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                if UnixStream::connect(&path).is_ok() {
                    return Err(io::Error::new(
                        ErrorKind::AddrInUse,
                        "another heaptap listens for this process",
                    ));
                }
                fs::remove_file(&path)?;
                UnixListener::bind(&path)?
            }
            bound => bound?,
        };
        // Nobody else can have come: the folder is ours alone.
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path, clients: Vec::new() })
    }

    /// Whether somebody has asked for a snapshot; [`Control::reply`] is for all who have.
    pub fn is_asked(&mut self) -> bool {
        while self.clients.len() < MOST_CLIENTS
            && let Ok((stream, _)) = self.listener.accept()
        {
            let may_ask = sys::peer_user(&stream).is_ok_and(|user| user == 0 || user == own_user());
            if may_ask && stream.set_nonblocking(true).is_ok() {
                self.clients.push(Client { stream, since: Instant::now(), heard: Vec::new() });
            }
        }
        self.clients.retain_mut(|client| client.listen() && client.since.elapsed() < PATIENCE);
        self.clients.iter().any(Client::has_asked)
    }

    /// Answers all who have asked.
    pub fn reply(&mut self, answer: &Result<Taken, String>) {
        let Ok(mut line) = serde_json::to_string(answer) else { return };
        line.push('\n');
        for client in self.clients.extract_if(.., |client| client.has_asked()) {
            // It fits the socket's buffer; who has gone meanwhile does not want it.
            let _ = (&client.stream).write_all(line.as_bytes());
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Client {
    /// Reads what has come. False for one to be let go.
    fn listen(&mut self) -> bool {
        let mut buf = [0; 64];
        if self.has_asked() {
            return true;
        }
        match (&self.stream).read(&mut buf) {
            Ok(0) => false,
            Ok(len) => {
                self.heard.extend_from_slice(&buf[..len]);
                REQUEST.starts_with(&self.heard)
            }
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }

    fn has_asked(&self) -> bool {
        self.heard == REQUEST
    }
}

/// Asks the heaptap that records process `pid` for a snapshot, and waits until it is written.
pub fn ask(pid: i32) -> Result<Taken, ControlError> {
    let mut last = None;
    for folder in folders_of_others(pid) {
        match UnixStream::connect(socket(&folder, pid)) {
            Ok(stream) => return ask_on(&stream, pid),
            // Left by one that was killed, or never there.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {}
            Err(error) => last = Some(error),
        }
    }
    Err(match last {
        Some(source) => ControlError::Unreachable { pid, source },
        None => ControlError::Nobody { pid },
    })
}

fn ask_on(mut stream: &UnixStream, pid: i32) -> Result<Taken, ControlError> {
    let no_answer = |why: String| ControlError::NoAnswer { pid, why };
    let failed = |error: io::Error| no_answer(error.to_string());
    // Anybody may make a socket in /tmp; who answers has to be the user whom we would believe.
    let user = sys::peer_user(stream).map_err(|errno| failed(errno.into()))?;
    if user != 0 && user != own_user() && own_user() != 0 {
        return Err(no_answer(format!("the socket is of user {user}")));
    }
    stream.set_read_timeout(Some(ANSWER_WITHIN)).map_err(failed)?;
    stream.write_all(REQUEST).map_err(failed)?;
    let mut line = String::new();
    BufReader::new(stream.take(1 << 16)).read_line(&mut line).map_err(failed)?;
    if line.is_empty() {
        return Err(no_answer("it ended".into()));
    }
    let answer: Result<Taken, String> =
        serde_json::from_str(&line).map_err(|error| no_answer(error.to_string()))?;
    answer.map_err(|why| ControlError::Refused { pid, why })
}

fn socket(folder: &Path, pid: i32) -> PathBuf {
    folder.join(format!("{pid}.sock"))
}

fn own_user() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// The folder of our sockets, made where it is missing: in $XDG_RUNTIME_DIR if that is ours, else in /tmp.
fn own_folder() -> io::Result<PathBuf> {
    let user = own_user();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| is_of(dir, user));
    let folder = match runtime {
        Some(dir) => dir.join("heaptap"),
        None => PathBuf::from(format!("/tmp/heaptap-{user}")),
    };
    match DirBuilder::new().mode(0o700).create(&folder) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    // Somebody else may have made it first.
    let found = fs::symlink_metadata(&folder)?;
    if !found.is_dir() || found.uid() != user || found.mode() & 0o077 != 0 {
        let why = format!("{} is not a folder of this user's alone", folder.display());
        return Err(io::Error::new(ErrorKind::PermissionDenied, why));
    }
    Ok(folder)
}

fn is_of(folder: &Path, user: u32) -> bool {
    fs::symlink_metadata(folder).is_ok_and(|found| found.is_dir() && found.uid() == user)
}

/// Where a heaptap of ours may have its socket; for root, also one of the target's user.
fn folders_of_others(pid: i32) -> Vec<PathBuf> {
    let user = own_user();
    let mut users = vec![user];
    if user == 0
        && let Ok(target) = fs::metadata(format!("/proc/{pid}"))
    {
        users.push(target.uid());
    }
    let mut folders: Vec<PathBuf> = std::env::var_os("XDG_RUNTIME_DIR")
        .map(|dir| PathBuf::from(dir).join("heaptap"))
        .into_iter()
        .collect();
    for user in users {
        folders.push(format!("/run/user/{user}/heaptap").into());
        let in_tmp = PathBuf::from(format!("/tmp/heaptap-{user}"));
        if is_of(&in_tmp, user) {
            folders.push(in_tmp);
        }
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken() -> Taken {
        Taken { index: 3, unix_ns: 1 << 60, live_bytes: 7, file: "/a/b c.heaptap".into() }
    }

    /// Looks until somebody has asked.
    fn serve(mut control: Control, answer: Result<Taken, String>) -> std::thread::JoinHandle<Control> {
        std::thread::spawn(move || {
            while !control.is_asked() {
                std::thread::sleep(Duration::from_millis(1));
            }
            control.reply(&answer);
            control
        })
    }

    #[test]
    fn who_asks_is_answered() {
        let folder = tempfile::tempdir().unwrap();
        let control = Control::listen_in(folder.path(), 77).unwrap();
        let path = socket(folder.path(), 77);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let served = serve(control, Ok(taken()));
        assert_eq!(ask_on(&UnixStream::connect(&path).unwrap(), 77).unwrap(), taken());
        let served = serve(served.join().unwrap(), Err("its disk is full".into()));
        let refused = ask_on(&UnixStream::connect(&path).unwrap(), 77).unwrap_err();
        assert!(
            matches!(&refused, ControlError::Refused { why, .. } if why == "its disk is full"),
            "{refused}"
        );
        drop(served.join().unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_of_a_dead_heaptap_is_replaced_and_that_of_a_living_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(socket(folder.path(), 5)).unwrap());
        assert!(socket(folder.path(), 5).exists());
        let living = Control::listen_in(folder.path(), 5).unwrap();
        assert!(Control::listen_in(folder.path(), 5).is_err());
        assert!(UnixStream::connect(&living.path).is_ok());
    }

    #[test]
    fn who_talks_nonsense_or_too_little_is_let_go() {
        let folder = tempfile::tempdir().unwrap();
        let mut control = Control::listen_in(folder.path(), 5).unwrap();
        let mut nonsense = UnixStream::connect(&control.path).unwrap();
        nonsense.write_all(b"GET / HTTP/1.1\r\n").unwrap();
        let mut silent = UnixStream::connect(&control.path).unwrap();
        silent.write_all(b"snap").unwrap();
        assert!(!control.is_asked());
        assert_eq!(control.clients.len(), 1);
        silent.write_all(b"shot\n").unwrap();
        assert!(control.is_asked());
        control.reply(&Ok(taken()));
        assert!(control.clients.is_empty());
    }

    #[test]
    fn nobody_records_a_process_that_is_not_there() {
        assert!(matches!(ask(i32::MAX), Err(ControlError::Nobody { .. })));
    }
}
