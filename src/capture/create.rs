//! How a capture file comes into being: for its owner only, over nothing unless asked, through no link.

use super::error::CaptureError;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Opens `path` for writing.
///
/// The file is always a new one (`O_EXCL`, 0600), also with `force`: the old regular file is removed
/// first. So whoever holds the old one open sees none of the new, its owner and mode do not
/// matter, and its other hard links keep it. `/dev/null` is taken as it is.
pub(super) fn create(path: &Path, force: bool) -> Result<File, CaptureError> {
    let failed = |source: io::Error| CaptureError::Create { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(found) if is_null_device(&found) => return open_null(path),
        Ok(found) if !found.file_type().is_file() => {
            return Err(CaptureError::NotRegular { path: path.to_owned(), what: describe(&found) });
        }
        Ok(_) if !force => return Err(CaptureError::Exists { path: path.to_owned() }),
        Ok(_) => fs::remove_file(path).map_err(failed)?,
    }
    OpenOptions::new()
        // A capture with snapshots is read when it is made smaller.
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => CaptureError::Exists { path: path.to_owned() },
            _ => failed(error),
        })
}

fn open_null(path: &Path) -> Result<File, CaptureError> {
    let failed = |source: io::Error| CaptureError::Create { path: path.to_owned(), source };
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    // Looked at again through the descriptor: the path may have changed between the two calls.
    let opened = file.metadata().map_err(failed)?;
    if is_null_device(&opened) {
        Ok(file)
    } else {
        Err(CaptureError::NotRegular { path: path.to_owned(), what: describe(&opened) })
    }
}

fn is_null_device(metadata: &fs::Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == libc::makedev(1, 3)
}

fn describe(metadata: &fs::Metadata) -> &'static str {
    let file_type = metadata.file_type();
    if file_type.is_symlink() {
        "a symbolic link"
    } else if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a FIFO"
    } else if file_type.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_new_file_is_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.heaptap");
        let file = create(&path, false).unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o600);
    }

    #[test]
    fn an_old_file_stays_unless_forced_and_is_then_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.heaptap");
        fs::write(&path, "old").unwrap();
        let other_name = dir.path().join("other");
        fs::hard_link(&path, &other_name).unwrap();
        assert!(matches!(create(&path, false), Err(CaptureError::Exists { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        let file = create(&path, true).unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o600);
        assert_eq!(fs::read(&path).unwrap(), b"");
        assert_eq!(fs::read(&other_name).unwrap(), b"old");
    }

    #[test]
    fn links_directories_and_devices_are_refused_even_when_forced() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("precious");
        fs::write(&target, "precious").unwrap();
        let link = dir.path().join("link");
        symlink(&target, &link).unwrap();
        for path in [link.as_path(), dir.path(), Path::new("/dev/zero")] {
            assert!(matches!(create(path, true), Err(CaptureError::NotRegular { .. })), "{path:?}");
        }
        assert_eq!(fs::read(&target).unwrap(), b"precious");
    }

    #[test]
    fn the_null_device_is_taken() {
        create(Path::new("/dev/null"), false).unwrap();
        create(Path::new("/dev/null"), true).unwrap();
    }
}
