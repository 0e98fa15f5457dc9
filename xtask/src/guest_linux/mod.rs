//! `cargo xtask guest-linux`: unmodified Linux guests on the KVM that users have.
//!
//! A software-emulated processor with SVM runs Debian's kernel with its own `kvm_amd`; in it
//! `trine-vmm` boots the same kernel as a guest (`vmm/examples/linux_guests.rs` has the tests). So
//! it runs on any machine, without virtualisation; it says nothing about speed.

mod archive;
mod modules;
mod packages;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use archive::Archive;
use modules::Modules;
use packages::{Found, Packages};

use crate::shell;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// What `verify` runs: each way to boot, several vCPUs, a disk that comes and goes.
const SHORT: [&str; 3] =
    ["bzimage_boots_and_powers_off", "pvh_boots_two_vcpus", "disk_is_plugged_used_and_unplugged"];
/// Modules of the emulated host, and of the guests.
const HOST_MODULES: [&str; 2] = ["kvm-amd", "tun"];
const GUEST_MODULES: [&str; 7] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "ext4",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
];
/// Memory of the emulated host, MiB: more than the guest whose memory goes on beyond the hole. QEMU
/// takes only what is touched.
const HOST_MIB: &str = "4096";
/// Bytes of the guests' root disk, and of the file on it that they read.
const ROOT_BYTES: u64 = 24 << 20;
const PAYLOAD_BYTES: usize = 1 << 20;
/// An emulated host that says nothing for so long hangs.
const SILENCE: Duration = Duration::from_secs(180);

/// What `guest-linux` takes.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Runs only the tests that `verify` runs.
    #[arg(long)]
    short: bool,
    /// Nested paging of the emulated host: 1, 0, or both one after the other.
    #[arg(long, value_enum, default_value = "both")]
    npt: Npt,
    /// Runs only these tests (by name, see `vmm/examples/linux_guests`).
    tests: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Npt {
    #[value(name = "1")]
    On,
    #[value(name = "0")]
    Off,
    Both,
}

/// Runs the tests and ends with one line, `N passed, N failed`.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let chosen: Vec<&str> = if arguments.short {
        SHORT.to_vec()
    } else {
        arguments.tests.iter().map(String::as_str).collect()
    };
    let npt: &[bool] = match arguments.npt {
        Npt::On => &[true],
        Npt::Off => &[false],
        Npt::Both => &[true, false],
    };
    match execute(&chosen, npt)? {
        Summary::Ran { passed, failed } => {
            println!("{passed} passed, {failed} failed");
            ensure!(failed == 0, "{failed} tests with Linux guests failed");
            Ok(())
        }
        Summary::Skipped(why) => bail!("{why}"),
    }
}

/// The short form, for `verify`; where its parts can't be had it says so and is skipped.
pub(crate) fn verify() -> Result<()> {
    match execute(&SHORT, &[true])? {
        Summary::Ran { passed, failed } => {
            println!("{passed} passed, {failed} failed");
            ensure!(failed == 0, "{failed} tests with Linux guests failed");
        }
        Summary::Skipped(why) => println!("SKIPPED: no Linux guest was booted: {why}"),
    }
    Ok(())
}

enum Summary {
    Ran { passed: u32, failed: u32 },
    Skipped(String),
}

fn execute(tests: &[&str], npt: &[bool]) -> Result<Summary> {
    let directory = shell::target_directory().join("guest-linux");
    fs::create_dir_all(&directory).context("make the directory for guest-linux")?;
    let packages = match packages::find(&directory)? {
        Found::All(packages) => packages,
        Found::Missing(why) => return Ok(Summary::Skipped(why)),
    };
    let host = Host::prepare(&packages, &directory)?;
    let (mut passed, mut failed) = (0, 0);
    for npt in npt {
        println!(
            "guest-linux: emulated host with nested paging {}",
            if *npt { "on" } else { "off" }
        );
        let (good, bad) = host.run(tests, *npt)?;
        passed += good;
        failed += bad;
    }
    Ok(Summary::Ran { passed, failed })
}

/// An emulated host, ready to start, with files of its own: several may run at once.
struct Host {
    directory: PathBuf,
    qemu: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Host {
    fn prepare(packages: &Packages, directory: &Path) -> Result<Host> {
        let programs = build(directory)?;
        let directory = directory.join(format!("run-{}", std::process::id()));
        fs::create_dir_all(&directory).context("make the run's directory")?;
        let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
        let bzimage = read(&packages.bzimage()?)?;
        let vmlinux = archive::unpack_kernel(&bzimage)?;
        let busybox = read(&packages.busybox)?;
        let modules = Modules::find(&packages.modules()?)?;

        let mut guest = Archive::new();
        guest.file("init", include_bytes!("guest_init.sh"));
        guest.file("bin/busybox", &busybox);
        guest.file("bin/guest-peer", &read(&programs.join("examples/guest_peer"))?);
        modules.add(&mut guest, &GUEST_MODULES)?;

        let (root, sum) = root_disk(packages, &directory, &busybox)?;
        let mut host = Archive::new();
        host.file("init", include_bytes!("host_init.sh"));
        host.file("bin/busybox", &busybox);
        host.file("bin/trine-vmm", &read(&programs.join("trine-vmm"))?);
        host.file("bin/linux-guests", &read(&programs.join("examples/linux_guests"))?);
        host.file("guest/bzimage", &bzimage);
        host.file("guest/vmlinux", &vmlinux);
        host.file("guest/initrd", &guest.finish());
        host.file("guest/root", &root);
        host.file("guest/payload.md5", sum.as_bytes());
        modules.add(&mut host, &HOST_MODULES)?;

        let (kernel, initrd) = (directory.join("vmlinux"), directory.join("initrd"));
        fs::write(&kernel, &vmlinux).context("write the unpacked kernel")?;
        fs::write(&initrd, host.finish()).context("write the emulated host's files")?;
        let qemu = packages.qemu.clone();
        Ok(Host { directory, qemu, kernel, initrd })
    }

    /// Runs the host once; returns the numbers of passed and failed tests.
    fn run(&self, tests: &[&str], npt: bool) -> Result<(u32, u32)> {
        let (output, log) = (self.directory.join("output"), self.directory.join("log"));
        for file in [&output, &log] {
            File::create(file).with_context(|| format!("make {}", file.display()))?;
        }
        let mut child = self
            .command(tests, npt, &output, &log)?
            .stdin(Stdio::null())
            .spawn()
            .context("start QEMU")?;
        let told = follow(&output, || {
            child.try_wait().map(|status| status.is_some()).context("wait for QEMU")
        });
        let _ = child.kill();
        let _ = child.wait();
        let told = told?;
        let numbers = told.lines().find_map(|line| {
            let (passed, rest) = line.split_once(" passed, ")?;
            Some((passed.parse().ok()?, rest.strip_suffix(" failed")?.parse().ok()?))
        });
        numbers.with_context(|| {
            let log = fs::read_to_string(&log).unwrap_or_default();
            let last: Vec<&str> = log.lines().rev().take(30).collect();
            let last: Vec<&str> = last.into_iter().rev().collect();
            format!("the emulated host did not finish; its kernel said:\n{}", last.join("\n"))
        })
    }

    fn command(&self, tests: &[&str], npt: bool, output: &Path, log: &Path) -> Result<Command> {
        let line = format!(
            "console=ttyS1 quiet reboot=t panic=-1 tsc=reliable tsc_early_khz={} npt={} tests={}",
            tsc_khz()?,
            u8::from(npt),
            tests.join(",")
        );
        let mut command = Command::new(&self.qemu);
        command
            .args(["-M", "microvm,rtc=on,isa-serial=off,acpi=off"])
            .args(["-accel", "tcg,tb-size=256", "-m", HOST_MIB])
            .args(["-cpu", "max,-pku,-la57,-mpx,-avx,-avx2,-f16c,-fma,-vaes,-vpclmulqdq"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-chardev", &format!("file,id=output,path={}", output.display())])
            .args(["-chardev", &format!("file,id=log,path={}", log.display())])
            .args(["-device", "isa-serial,chardev=output,iobase=0x3f8,irq=4"])
            .args(["-device", "isa-serial,chardev=log,iobase=0x2f8,irq=3"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initrd)
            .args(["-append", &line]);
        Ok(command)
    }
}

/// Copies what appears in `output` to standard output, until `ended` or silence.
fn follow(output: &Path, mut ended: impl FnMut() -> Result<bool>) -> Result<String> {
    let mut file = File::open(output).context("open the output")?;
    let (mut told, mut shown) = (Vec::new(), 0);
    let mut heard = Instant::now();
    loop {
        let over = ended()?;
        let before = told.len();
        file.read_to_end(&mut told).context("read the output")?;
        if told.len() > before {
            heard = Instant::now();
        }
        let text = String::from_utf8_lossy(&told[shown..]).into_owned();
        if let Some(end) = text.rfind('\n') {
            for line in text[..end].lines().map(|line| line.trim_end_matches('\r')) {
                println!("  {line}");
            }
            shown += end + 1;
        }
        if over {
            return Ok(String::from_utf8_lossy(&told).replace('\r', ""));
        }
        ensure!(heard.elapsed() < SILENCE, "the emulated host has said nothing for {SILENCE:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Builds the VMM and the tests without libraries of the machine; returns their directory.
fn build(directory: &Path) -> Result<PathBuf> {
    let flags = "-C relocation-model=static -C target-feature=+crt-static -C strip=debuginfo";
    shell::run(
        shell::cargo()
            .args(["build", "--locked", "--package", "vmm", "--target", TARGET])
            .args(["--bin", "trine-vmm", "--example", "linux_guests"])
            .args(["--example", "guest_peer", "--target-dir"])
            .arg(directory)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.replace(' ', "\x1f")),
    )?;
    Ok(directory.join(TARGET).join("debug"))
}

/// An ext4 disk with busybox and a file, and that file's checksum.
fn root_disk(packages: &Packages, directory: &Path, busybox: &[u8]) -> Result<(Vec<u8>, String)> {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let files = directory.join("root");
    let _ = fs::remove_dir_all(&files);
    for folder in ["bin", "sbin", "dev", "proc", "sys"] {
        fs::create_dir_all(files.join(folder)).context("make the root disk's folders")?;
    }
    let mut payload = vec![0u8; PAYLOAD_BYTES];
    let mut state = 0x1234_5678_u32;
    for byte in &mut payload {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    let contents: [(&str, &[u8]); 4] = [
        ("bin/busybox", busybox),
        ("sbin/init", include_bytes!("root_init.sh")),
        ("starts", b"0\n"),
        ("payload", &payload),
    ];
    for (name, content) in contents {
        let path = files.join(name);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).context("set a mode")?;
    }
    for applet in ["sh", "cat", "sync", "awk", "md5sum", "mount", "poweroff", "sleep"] {
        symlink("busybox", files.join("bin").join(applet)).context("link an applet")?;
    }
    let disk = directory.join("root.img");
    File::create(&disk).and_then(|file| file.set_len(ROOT_BYTES)).context("make the root disk")?;
    shell::output(Command::new(&packages.mkfs).args(["-q", "-F", "-d"]).arg(&files).arg(&disk))?;
    let sum =
        shell::output(Command::new(&packages.busybox).arg("md5sum").arg(files.join("payload")))?;
    let sum = sum.split_whitespace().next().unwrap_or_default().to_string();
    Ok((fs::read(&disk).context("read the root disk")?, sum))
}

/// The frequency of this machine's time stamp counter: the emulated host can't measure it reliably.
fn tsc_khz() -> Result<u64> {
    let info = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
    let mhz = info.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split(": ").nth(1));
    let mhz: f64 = mhz.context("/proc/cpuinfo has no \"cpu MHz\"")?.trim().parse()?;
    Ok((mhz * 1000.0) as u64)
}
