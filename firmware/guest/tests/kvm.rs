//! The guest on a virtual CPU, in the project's own VMM: what it prints, what is on its disks.
//!
//! The VMM is `TRINE_VMM`, or the one that the project's workspace has built. Without it, or
//! without `/dev/kvm`, a test says so and ends.

use rustix::fd::AsFd;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, send, sendmsg,
};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, Lines};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

const SECTOR_BYTES: usize = 2048;

/// A directory for one test, removed at its end.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("trine-guest-{test}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Directory(path)
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The VMM, or `None` after saying what is missing.
fn vmm(test: &str) -> Option<PathBuf> {
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        eprintln!("SKIPPED {test}: no /dev/kvm: {error}");
        return None;
    }
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/debug/trine-vmm");
    let path = std::env::var_os("TRINE_VMM").map_or(built, PathBuf::from);
    if !path.is_file() {
        eprintln!("SKIPPED {test}: no VMM at {}; set TRINE_VMM", path.display());
        return None;
    }
    Some(path)
}

/// A running guest.
struct Guest {
    child: Child,
    console: Lines<BufReader<ChildStdout>>,
}

impl Guest {
    /// `more` is the rest of the configuration, as members of a JSON object.
    fn start(vmm: &Path, directory: &Directory, cmdline: &str, more: &str) -> Guest {
        let config = format!(
            r#"{{"version": 1, "id": "test", "memory_mib": 32,
                "boot": {{"kernel": {{"path": "{}"}}, "cmdline": "{cmdline}"}}{more}}}"#,
            env!("CARGO_BIN_EXE_guest"),
        );
        let config = directory.file("vm.json", config.as_bytes());
        let mut child = Command::new(vmm)
            .args(["run", "--config"])
            .arg(config)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let console = BufReader::new(child.stdout.take().unwrap()).lines();
        Guest { child, console }
    }

    /// Reads on until a line that begins so.
    fn wait_for(&mut self, start: &str) -> String {
        let mut seen = Vec::new();
        for line in &mut self.console {
            let line = line.unwrap();
            if line.starts_with(start) {
                return line;
            }
            seen.push(line);
        }
        panic!("the guest ended without the line {start:?}; it said {seen:#?}");
    }

    /// The rest of the console and the exit code.
    fn finish(mut self) -> (Vec<String>, Option<i32>) {
        let lines = self.console.by_ref().map(Result::unwrap).collect();
        (lines, self.child.wait().unwrap().code())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn record(name: &[u8], sector: u32, bytes: usize) -> Vec<u8> {
    let mut record = vec![0; (33 + name.len()).next_multiple_of(2)];
    record[0] = record.len() as u8;
    record[2..6].copy_from_slice(&sector.to_le_bytes());
    record[10..14].copy_from_slice(&(bytes as u32).to_le_bytes());
    record[32] = name.len() as u8;
    record[33..33 + name.len()].copy_from_slice(name);
    record
}

/// A config drive with plain ISO 9660 names.
fn config_drive(user_data: &str) -> Vec<u8> {
    let meta_data = r#"{"uuid": "f00d-1", "hostname": "test"}"#;
    let mut label = [b' '; 32];
    label[..8].copy_from_slice(b"config-2");
    let mut volume = vec![0; SECTOR_BYTES];
    volume[..6].copy_from_slice(b"\x01CD001");
    volume[40..72].copy_from_slice(&label);
    volume[128..130].copy_from_slice(&(SECTOR_BYTES as u16).to_le_bytes());
    volume[156..190].copy_from_slice(&record(&[0], 18, SECTOR_BYTES));
    let files = [
        record(b"META_DATA.JSON;1", 21, meta_data.len()),
        record(b"USER_DATA.;1", 22, user_data.len()),
    ];
    let sectors: [&[u8]; 7] = [
        &volume,
        b"\xffCD001",
        &record(b"OPENSTACK", 19, SECTOR_BYTES),
        &record(b"LATEST", 20, SECTOR_BYTES),
        &files.concat(),
        meta_data.as_bytes(),
        user_data.as_bytes(),
    ];
    let mut image = vec![0; 16 * SECTOR_BYTES];
    for sector in sectors {
        image.extend_from_slice(sector);
        image.resize(image.len().next_multiple_of(SECTOR_BYTES), 0);
    }
    image
}

fn disk(id: &str, path: &Path, read_only: bool) -> String {
    format!(
        r#"{{"id": "{id}", "serial": "{id}", "read_only": {read_only}, "source": {{"raw": {{"path": "{}"}}}}}}"#,
        path.display()
    )
}

/// One request over the control socket, with a descriptor where it needs one.
fn control(socket: &Path, request: &str, file: Option<&File>) -> String {
    let stream = UnixStream::connect(socket).unwrap();
    let message = format!(r#"{{"version": 1, "request": {request}}}"#);
    let length = (message.len() as u32).to_le_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
    if !descriptors.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    }
    sendmsg(&stream, &[IoSlice::new(&length)], &mut ancillary, SendFlags::empty()).unwrap();
    send(&stream, message.as_bytes(), SendFlags::empty()).unwrap();
    let mut length = [0; 4];
    assert_eq!(recv(&stream, &mut length, RecvFlags::WAITALL).unwrap().0, 4);
    let mut reply = vec![0; u32::from_le_bytes(length) as usize];
    recv(&stream, reply.as_mut_slice(), RecvFlags::WAITALL).unwrap();
    String::from_utf8(reply).unwrap()
}

#[test]
fn steps_of_the_config_drive_run_on_real_disks() {
    let Some(vmm) = vmm("steps_of_the_config_drive_run_on_real_disks") else { return };
    let directory = Directory::new("steps");
    let steps = "#trine-steps\nprint first\nsleep 0.01\n\
        disk-wait vol\ndisk-write vol pattern=trine bytes=200704\ndisk-verify vol pattern=trine bytes=4096\n\
        poweroff\nprint never\n";
    let drive = directory.file("drive", &config_drive(steps));
    let volume = directory.file("volume", &vec![0xAA; 1 << 20]);
    let disks =
        format!(r#", "disks": [{}, {}]"#, disk("drive", &drive, true), disk("vol", &volume, false));
    let (lines, code) = Guest::start(&vmm, &directory, "", &disks).finish();

    assert_eq!(code, Some(0), "{lines:#?}");
    let fixed: Vec<&str> = lines.iter().map(|line| line.split(" bytes").next().unwrap()).collect();
    assert_eq!(
        fixed,
        [
            concat!("trine: booted ", env!("CARGO_PKG_VERSION")),
            "trine: no network device",
            "trine: config-drive f00d-1",
            "trine: metadata failed no network device",
            "trine: step 1 print ok first",
            "trine: step 2 sleep ok",
            "trine: step 3 disk-wait ok 1048576",
            "trine: step 4 disk-write ok 200704",
            "trine: step 5 disk-verify ok 4096",
            "trine: step 6 poweroff ok",
            "trine: steps done",
        ]
    );
    let written = fs::read(&volume).unwrap();
    let pattern: Vec<u8> = b"trine".iter().copied().cycle().take(200_704).collect();
    assert!(written[..200_704] == pattern, "the pattern is not on the volume");
    assert!(
        written[200_704..].iter().all(|byte| *byte == 0xAA),
        "bytes behind the pattern changed"
    );
}

#[test]
fn a_disk_is_kept_busy_and_serves_on_as_before() {
    let Some(vmm) = vmm("a_disk_is_kept_busy_and_serves_on_as_before") else { return };
    let directory = Directory::new("load");
    let steps = "#trine-steps\n\
        disk-load vol write order=sequential bytes=65536 depth=64 seconds=0.05\n\
        disk-load vol read depth=7 seconds=0.05\n\
        disk-write vol pattern=trine bytes=4096\n\
        disk-load drive write\n";
    let drive = directory.file("drive", &config_drive(steps));
    let volume = directory.file("volume", &vec![0xAA; 1 << 20]);
    let disks =
        format!(r#", "disks": [{}, {}]"#, disk("drive", &drive, true), disk("vol", &volume, false));
    let mut guest = Guest::start(&vmm, &directory, "", &disks);
    let mut figures = |step: &str| {
        let line = guest.wait_for(step);
        let words: Vec<&str> = line[step.len()..].split_whitespace().collect();
        assert_eq!((words[1], words[2], words[4]), ("operations", "in", "ns"), "{line}");
        (words[0].parse::<u64>().unwrap(), words[3].parse::<u64>().unwrap())
    };
    let (writes, nanos) = figures("trine: step 1 disk-load ok ");
    assert!(writes >= 64 && nanos >= 50_000_000, "{writes} in {nanos} ns");
    let (reads, nanos) = figures("trine: step 2 disk-load ok ");
    assert!(reads >= 7 && nanos >= 50_000_000, "{reads} in {nanos} ns");
    guest.wait_for("trine: step 3 disk-write ok 4096");
    guest.wait_for("trine: step 4 disk-load failed the disk is read-only");
    drop(guest);
    // Each of the 64 requests writes a byte of its own, over the 16 places of the volume.
    let written = fs::read(&volume).unwrap();
    assert_eq!(&written[..5], b"trine");
    for place in 0..16 {
        let bytes = &written[place * 65_536 + 4096..(place + 1) * 65_536];
        assert!((1..=64).contains(&bytes[0]), "{}", bytes[0]);
        // Two requests for one place are under way at once: whole sectors of either.
        for sector in bytes.chunks(512) {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector of two writes");
        }
    }
}

#[test]
fn a_volume_comes_and_goes_while_the_guest_runs() {
    let Some(vmm) = vmm("a_volume_comes_and_goes_while_the_guest_runs") else { return };
    let directory = Directory::new("hotplug");
    let steps = "#trine-steps\ndisk-wait one\ndisk-write one pattern=moved bytes=8192\ndisk-gone one\n\
        disk-wait two\ndisk-verify two pattern=moved bytes=8192\ndisk-verify two pattern=other bytes=512\n";
    let drive = directory.file("drive", &config_drive(steps));
    let volume = directory.file("volume", &vec![0; 1 << 20]);
    let socket = directory.0.join("control");
    let more = format!(
        r#", "disks": [{}], "control": {{"path": "{}"}}"#,
        disk("drive", &drive, true),
        socket.display()
    );
    let mut guest = Guest::start(&vmm, &directory, "", &more);
    guest.wait_for("trine: metadata failed");
    let file = File::options().read(true).write(true).open(&volume).unwrap();
    let add = |id: &str| {
        format!(
            r#"{{"add_disk": {{"id": "{id}", "serial": "{id}", "source": {{"raw": {{"descriptor": 0}}}}}}}}"#
        )
    };

    assert_eq!(control(&socket, &add("one"), Some(&file)), r#""done""#);
    guest.wait_for("trine: step 2 disk-write ok");
    assert_eq!(control(&socket, r#"{"remove_disk": {"id": "one"}}"#, None), r#""done""#);
    guest.wait_for("trine: step 3 disk-gone ok");
    assert_eq!(control(&socket, &add("two"), Some(&file)), r#""done""#);
    guest.wait_for("trine: step 5 disk-verify ok");
    let failed = guest.wait_for("trine: step 6 disk-verify");
    assert_eq!(failed, "trine: step 6 disk-verify failed the byte at 0 differs");
    guest.wait_for("trine: steps failed at 6");
    assert_eq!(control(&socket, r#"{"remove_disk": {"id": "two"}}"#, None), r#""done""#);
}

/// A lease page as `abi::lease` describes it, written by hand: a changed layout fails here.
fn lease_page(until_ns: u64) -> Vec<u8> {
    let mut page = vec![0; 4096];
    page[..8].copy_from_slice(b"TRINELSE");
    page[8] = 1;
    page[16..24].copy_from_slice(&until_ns.to_le_bytes());
    page[24..32].copy_from_slice(&(!until_ns).to_le_bytes());
    page
}

#[test]
fn a_write_waits_for_the_hosts_lease_and_then_is_done() {
    let Some(vmm) = vmm("a_write_waits_for_the_hosts_lease_and_then_is_done") else { return };
    let directory = Directory::new("lease");
    let steps = "#trine-steps\ndisk-wait vol\nprint reading\ndisk-verify vol pattern=old bytes=512\n\
        disk-write vol pattern=new bytes=512\npoweroff\n";
    let drive = directory.file("drive", &config_drive(steps));
    let old: Vec<u8> = b"old".iter().copied().cycle().take(1 << 20).collect();
    let volume = directory.file("volume", &old);
    let page = directory.file("lease", &lease_page(0));
    let socket = directory.0.join("control");
    let more = format!(
        r#", "disks": [{}, {}], "control": {{"path": "{}"}}, "lease": {{"path": "{}"}}"#,
        disk("drive", &drive, true),
        disk("vol", &volume, false),
        socket.display(),
        page.display()
    );
    let mut guest = Guest::start(&vmm, &directory, "", &more);
    // Reading needs no lease.
    guest.wait_for("trine: step 3 disk-verify ok");
    assert!(control(&socket, r#""status""#, None).contains(r#""writes":"waiting""#));
    assert!(fs::read(&volume).unwrap() == old, "the volume changed without a lease");
    let file = File::options().write(true).open(&page).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &lease_page(u64::MAX >> 1), 0).unwrap();
    let (lines, code) = guest.finish();
    assert_eq!(code, Some(0), "{lines:#?}");
    assert!(lines[0].starts_with("trine: step 4 disk-write ok 512 bytes"), "{lines:#?}");
    assert_eq!(&fs::read(&volume).unwrap()[..6], b"newnew");
}

#[test]
fn a_wrong_step_fails_the_list_before_anything_runs() {
    let Some(vmm) = vmm("a_wrong_step_fails_the_list_before_anything_runs") else { return };
    let directory = Directory::new("wrong");
    let drive = directory.file("drive", &config_drive("#trine-steps\nprint a\nping nobody\n"));
    let disks = format!(r#", "disks": [{}]"#, disk("drive", &drive, true));
    let mut guest = Guest::start(&vmm, &directory, "", &disks);
    let first = guest.wait_for("trine: step ");
    assert_eq!(first, "trine: step 2 ping failed ADDRESS nobody is not an IPv4 address");
    guest.wait_for("trine: steps failed at 2");
}

#[test]
fn the_command_line_ends_the_guest_after_main() {
    let Some(vmm) = vmm("the_command_line_ends_the_guest_after_main") else { return };
    let directory = Directory::new("main");
    let (lines, code) = Guest::start(&vmm, &directory, "exit-after-main", "").finish();
    assert_eq!((lines.len(), code), (1, Some(0)), "{lines:?}");
}
