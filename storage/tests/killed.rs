//! A storage process of its own, killed at any moment: what it acknowledged is there, what was half
//! made is gone.

mod hosts;

use hosts::{Authority, Host, attachment, pattern};
use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use storage::{Client, Error, ErrorKind, StorageConfig};

/// Where the child finds its directory; absent in the test itself.
const PLACE: &str = "TRINE_STORAGE_TEST_PLACE";
const ROUNDS: u64 = 12;
const SIZE: u64 = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(60);

/// Not a test of its own: the process that the test below starts and kills.
#[test]
fn storage_process() {
    let Some(place) = std::env::var_os(PLACE) else { return };
    let place = Path::new(&place);
    let [ca, cert, key] = ["ca", "cert", "key"].map(|name| place.join(name));
    let config = StorageConfig {
        control: place.join("control"),
        directory: place.join("storage"),
        listen: ([127, 0, 0, 1], 0).into(),
        tls: storage::Tls::from_files(&ca, &cert, &key).unwrap(),
        cluster_id: hosts::CLUSTER.to_owned(),
    };
    storage::run(config).unwrap();
}

/// The process; it does not outlive the test.
struct Process(Child);

impl Process {
    fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.0)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(place: &Path) -> (Process, Client) {
    let child = Process(
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "storage_process"])
            .env(PLACE, place)
            .stdout(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let begun = Instant::now();
    loop {
        if let Ok(mut client) = Client::connect(&place.join("control"))
            && client.status().is_ok()
        {
            return (child, client);
        }
        assert!(begun.elapsed() < DEADLINE, "the storage process does not serve");
        std::thread::yield_now();
    }
}

/// What the process was asked for and has said.
#[derive(Default)]
struct Said {
    /// Volume: the generation that a server holds it at (0: nobody), where that is certain.
    volumes: BTreeMap<String, u64>,
    /// What was asked last and not answered: anything may be true of it.
    open: Option<String>,
    images: Vec<(String, u64)>,
}

/// Asks for one thing after the other until the process is gone.
fn work(client: &mut Client, said: &mut Said, round: u64) {
    for step in 0.. {
        let id = format!("v-{round}-{step}");
        said.open = Some(id.clone());
        let mut one = || -> Result<(), Error> {
            client.create_volume(&id, SIZE)?;
            said.volumes.insert(id.clone(), 0);
            client.attach_volume(attachment(&id, "server", step + 1))?;
            said.volumes.insert(id.clone(), step + 1);
            if step % 3 == 0 {
                let content = pattern(70_000 + step as usize);
                let (reader, mut writer) = std::io::pipe().unwrap();
                let size_bytes = content.len() as u64;
                let writing = std::thread::spawn(move || {
                    let _ = writer.write_all(&content);
                });
                let image = client.import_image("image", "raw", 1 << 30, OwnedFd::from(reader));
                writing.join().unwrap();
                said.images.push((image?.sha512, size_bytes));
            }
            if step % 2 == 0 {
                said.volumes.remove(&id);
                client.delete_volume(&id, Some(step + 2))?;
            }
            Ok(())
        };
        match one() {
            Ok(()) => said.open = None,
            Err(error) => {
                assert_eq!(error.kind, ErrorKind::Unreachable, "{error}");
                return;
            }
        }
    }
}

fn check(client: &mut Client, said: &Said, place: &Path) {
    let status = client.status().unwrap();
    assert_eq!(status.volumes_damaged, []);
    let found: BTreeMap<String, u64> = status
        .volumes
        .iter()
        .filter(|volume| said.open.as_ref() != Some(&volume.id))
        .map(|volume| (volume.id.clone(), volume.generation))
        .collect();
    let open = |id: &String| said.open.as_ref() == Some(id);
    let expected: BTreeMap<String, u64> = said
        .volumes
        .iter()
        .filter(|(id, _)| !open(id))
        .map(|(id, generation)| (id.clone(), *generation))
        .collect();
    assert_eq!(found, expected);
    for (sha512, size_bytes) in &said.images {
        assert!(client.read_image(sha512).unwrap().size_bytes == *size_bytes);
    }
    let staged = std::fs::read_dir(place.join("storage/staging")).unwrap().count();
    assert_eq!(staged, 0, "half made things are left");
}

#[test]
fn a_killed_process_kept_what_it_said_and_nothing_half_made() {
    let host = Host::start(&Authority::new(), 1);
    let identity = host.config().tls;
    drop(host);
    let place = tempfile::tempdir().unwrap();
    for (name, pem) in
        [("ca", &identity.ca_pem), ("cert", &identity.cert_pem), ("key", &identity.key_pem)]
    {
        std::fs::write(place.path().join(name), pem).unwrap();
    }
    let mut said = Said::default();
    for round in 0..ROUNDS {
        let (process, mut client) = start(place.path());
        check(&mut client, &said, place.path());
        // Whatever became of the last request, its volume is deleted now.
        if let Some(id) = said.open.take() {
            client.delete_volume(&id, Some(u64::MAX)).unwrap();
            said.volumes.remove(&id);
        }
        let pid = process.pid();
        let pause = Duration::from_micros(3_000 + round * 7_919 % 60_000);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(pause);
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            });
            work(&mut client, &mut said, round);
        });
    }
    let (_process, mut client) = start(place.path());
    check(&mut client, &said, place.path());
    assert!(!said.volumes.is_empty(), "every process was killed before it did anything");
}
