//! What `trine` carries inside itself (see `build.rs`) and how it gets where it can run.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

static VMM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/trine-vmm"));
static FLOOR: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kvm-floor"));

/// The built-in guest image: an ELF unikernel, uploaded to the catalog like any other image.
pub(crate) static GUEST_IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

/// The embedded executables as files.
#[derive(Clone, Debug)]
pub(crate) struct Executables {
    /// The VMM and its spawner.
    pub(crate) vmm: PathBuf,
    /// The smallest possible raw-KVM program, the benchmark's floor.
    pub(crate) floor: PathBuf,
}

/// Writes the executables into `directory`, under names that carry their content's hash: a newer
/// `trine` never replaces the file that a running spawner was started from.
pub(crate) fn install(directory: &Path) -> io::Result<Executables> {
    fs::create_dir_all(directory)?;
    Ok(Executables {
        vmm: install_one(directory, "trine-vmm", VMM)?,
        floor: install_one(directory, "kvm-floor", FLOOR)?,
    })
}

fn install_one(directory: &Path, name: &str, content: &[u8]) -> io::Result<PathBuf> {
    let hash = hex::encode(&Sha256::digest(content)[..6]);
    let path = directory.join(format!("{name}-{hash}"));
    if fs::read(&path).is_ok_and(|existing| existing == content) {
        return Ok(path);
    }
    let partial = directory.join(format!(".{name}-{hash}.{}", std::process::id()));
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o700).open(&partial)?;
    file.write_all(content)?;
    file.set_permissions(Permissions::from_mode(0o755))?;
    drop(file);
    fs::rename(&partial, &path)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn installing_twice_gives_the_same_runnable_file() {
        let directory = tempfile::tempdir().unwrap();
        let first = install(directory.path()).unwrap();
        let second = install(directory.path()).unwrap();
        assert_eq!(first.vmm, second.vmm);
        assert_eq!(fs::read(&first.vmm).unwrap(), VMM);
        assert_eq!(fs::metadata(&first.floor).unwrap().permissions().mode() & 0o111, 0o111);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }
}
