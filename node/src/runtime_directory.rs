//! Where sockets lie: derived from the data directory and short, because a socket's path holds 108
//! bytes. It is recorded nowhere.

use sha2::{Digest, Sha256};
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Longest path of the directory itself, bytes: the longest socket below it still fits.
const PATH_BYTES_MAX: usize = 60;

/// No runtime directory that only we can use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// It can't be made.
    #[error("cannot make the runtime directory {path}")]
    Make {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Someone else made it first.
    #[error("{path} belongs to uid {owner} (mode {mode:o}); it must be ours alone: remove it")]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its mode.
        mode: u32,
    },
}

/// The runtime directory of a data directory, whether it is there or not.
pub(crate) fn path(data_directory: &Path) -> PathBuf {
    let uid = rustix::process::geteuid();
    let session = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    derive(data_directory, uid.as_raw(), session.as_deref())
}

fn derive(data_directory: &Path, uid: u32, session: Option<&Path>) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    let digest = Sha256::digest(data_directory.as_os_str().as_bytes());
    let name = hex::encode(&digest[..4]);
    if uid == 0 {
        return Path::new("/run/trine").join(name);
    }
    let of_session = session.filter(|path| path.is_absolute()).map(|p| p.join("trine").join(&name));
    of_session
        .filter(|path| path.as_os_str().len() <= PATH_BYTES_MAX)
        .unwrap_or_else(|| PathBuf::from(format!("/tmp/trine-{uid}-{name}")))
}

/// Makes the directory (mode 0700) or checks that the one there is ours alone.
pub(crate) fn make(data_directory: &Path) -> Result<PathBuf, Error> {
    let path = path(data_directory);
    let failed = |source| Error::Make { path: path.clone(), source };
    if let Some(parent) = path.parent().filter(|parent| !parent.exists()) {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(failed)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let found = fs::symlink_metadata(&path).map_err(failed)?;
    let (owner, mode) = (found.uid(), found.permissions().mode() & 0o7777);
    if !found.is_dir() || owner != rustix::process::geteuid().as_raw() || mode & 0o077 != 0 {
        return Err(Error::Foreign { path, owner, mode });
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_short_and_follows_the_data_directory() {
        let long = Path::new("/home/somebody/with/a/very/long/data/directory/for/a/cloud/node1");
        let session = Path::new("/run/user/1000");
        let a = derive(long, 1000, Some(session));
        assert_eq!(a, derive(long, 1000, Some(session)));
        assert!(a.starts_with("/run/user/1000/trine"));
        assert_ne!(a, derive(Path::new("/other"), 1000, Some(session)));
        assert!(derive(long, 0, Some(session)).starts_with("/run/trine"));
        for session in [None, Some(long), Some(Path::new("relative"))] {
            assert!(derive(long, 1000, session).starts_with("/tmp"), "{session:?}");
        }
    }
}
