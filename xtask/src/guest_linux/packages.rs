//! What the emulated host is made of: Debian's QEMU, busybox, tools for ext4, and Debian's
//! unmodified kernel, which is host and guest at once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::shell;

/// The package whose dependency is the newest kernel.
const KERNEL: &str = "linux-image-cloud-amd64";
/// Programs, and the packages that have them.
const PROGRAMS: [(&str, &str); 4] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("mkfs.ext4", "e2fsprogs"),
    ("dpkg-deb", "dpkg"),
];

/// Where things are.
pub(crate) struct Packages {
    pub(crate) qemu: PathBuf,
    pub(crate) busybox: PathBuf,
    pub(crate) mkfs: PathBuf,
    /// The kernel package, unpacked: `boot` and `lib/modules`.
    kernel: PathBuf,
}

/// What is there, or why it can't be had.
pub(crate) enum Found {
    All(Packages),
    /// A line for people.
    Missing(String),
}

/// Finds everything; installs by apt what is missing, as root. The kernel is only unpacked.
pub(crate) fn find(directory: &Path) -> Result<Found> {
    let missing = || PROGRAMS.iter().filter(|(program, _)| which(program).is_none());
    let names: Vec<_> = missing().map(|(_, package)| *package).collect();
    if !names.is_empty() {
        println!("guest-linux: installing {}", names.join(" "));
        if let Err(error) = install(&names) {
            return Ok(Found::Missing(format!(
                "{} can't be installed: {error:#}",
                names.join(" ")
            )));
        }
    }
    let program = |name: &str| which(name).with_context(|| format!("{name} is not in PATH"));
    let kernel = directory.join("kernel");
    if !kernel.join("boot").is_dir()
        && let Err(error) = unpack_kernel(directory, &kernel)
    {
        return Ok(Found::Missing(format!("{KERNEL} can't be had: {error:#}")));
    }
    Ok(Found::All(Packages {
        qemu: program("qemu-system-x86_64")?,
        busybox: program("busybox")?,
        mkfs: program("mkfs.ext4")?,
        kernel,
    }))
}

impl Packages {
    /// The kernel's `bzImage`.
    pub(crate) fn bzimage(&self) -> Result<PathBuf> {
        entry(&self.kernel.join("boot"), "vmlinuz-")
    }

    /// The directory of its modules.
    pub(crate) fn modules(&self) -> Result<PathBuf> {
        Ok(entry(&self.kernel.join("lib/modules"), "")?.join("kernel"))
    }
}

fn entry(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))?;
    entries
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .with_context(|| format!("no {prefix}* in {}", directory.display()))
}

fn install(packages: &[&str]) -> Result<()> {
    let apt = |arguments: &[&str]| {
        shell::output(
            Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args(arguments),
        )
    };
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    arguments.extend(packages);
    // The lists may be old or not there yet.
    apt(&arguments).or_else(|_| apt(&["update"]).and_then(|_| apt(&arguments))).map(drop)
}

/// Downloads the newest kernel package and unpacks it; nothing is installed.
fn unpack_kernel(directory: &Path, target: &Path) -> Result<()> {
    let newest = || -> Result<String> {
        let depends = shell::output(Command::new("apt-cache").args(["depends", KERNEL]))?;
        let line = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
        Ok(line.context("it depends on no kernel")?.to_string())
    };
    let download = |package: &str| {
        let mut command = Command::new("apt-get");
        shell::output(command.args(["download", package]).current_dir(directory))
    };
    let package = newest().or_else(|_| {
        shell::output(Command::new("apt-get").arg("update"))?;
        newest()
    })?;
    println!("guest-linux: downloading {package}");
    download(&package).or_else(|_| {
        shell::output(Command::new("apt-get").arg("update"))?;
        download(&package)
    })?;
    let archive = entry(directory, &format!("{package}_"))?;
    let unpacked = directory.join("kernel.new");
    let _ = fs::remove_dir_all(&unpacked);
    shell::output(Command::new("dpkg-deb").arg("-x").args([&archive, &unpacked]))?;
    fs::rename(&unpacked, target).context("move the unpacked kernel")?;
    fs::remove_file(archive).context("remove the package file")
}

fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
}
