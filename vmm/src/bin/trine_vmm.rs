//! `trine-vmm`: one guest (`run`), or the process that starts guests (`spawner`).

use std::path::Path;
use std::process::ExitCode;
use vmm::control::command;

const USAGE: &str = "\
trine-vmm: a virtual machine monitor, one guest in one process

Usage:
  trine-vmm run --config FILE   run the guest that FILE describes; its exit code is the guest's
  trine-vmm tier                say how tightly a guest is closed in here
  trine-vmm control SOCKET ...  ask something of a running guest; see below
  trine-vmm spawner             start guests for a node; its socket is standard input
  trine-vmm --help              this text

With --boot-timer, run says on standard error, when the guest has ended, how long its start took.

A configuration (JSON; every path is opened before the sandbox closes):
{
  \"version\": 1,
  \"id\": \"demo\",
  \"memory_mib\": 128,
  \"boot\": { \"kernel\": { \"path\": \"guest.elf\" }, \"cmdline\": \"\" },
  \"disks\": [ { \"id\": \"root\", \"source\": { \"raw\": { \"path\": \"disk.img\" } }, \"serial\": \"root\" } ],
  \"nets\": [ { \"id\": \"eth0\", \"mac\": \"fa:16:3e:00:00:01\", \"backend\": { \"tap\": { \"path\": \"tap0\" } } } ],
  \"control\": { \"path\": \"/run/demo.sock\" }
}
Console output goes to standard output unless \"console\": { \"file\": { \"path\": FILE } } is given.

The kernel is a unikernel's ELF, a Linux bzImage, or a Linux vmlinux with a PVH entry; the file says which.
Linux also takes \"vcpus\" and an initrd:
  \"vcpus\": 2,
  \"boot\": { \"kernel\": { \"path\": \"vmlinuz\" }, \"initrd\": { \"path\": \"initrd.img\" },
            \"cmdline\": \"console=ttyS0 root=/dev/vda\" }
Also, where wanted:
  \"rng\": { \"bytes_per_second\": 1048576 }         random numbers from the host
  \"balloon\": { \"target_mib\": 0 }                 memory the guest gives back; free pages are taken by themselves
  \"vsock\": { \"cid\": 3, \"socket\": { \"path\": \"/run/demo.vsock\" } }
                                                   streams: connect to the socket and write \"CONNECT PORT\\n\";
                                                   the guest's connections to port P go to /run/demo.vsock_P
A running guest, by its control socket:
{CONTROL}
Example:
  trine-vmm run --config demo.json &
  trine-vmm control /run/demo.sock add-disk '{\"id\": \"data\", \"source\": {\"raw\": {\"path\": \"data.img\"}}}'
  trine-vmm control /run/demo.sock metrics

Memory in huge pages: \"huge_pages\": \"transparent\", or \"reserved\" (vm.nr_hugepages).
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["run", "--config", file] => run(file, false),
        ["run", "--boot-timer", "--config", file] | ["run", "--config", file, "--boot-timer"] => {
            run(file, true)
        }
        ["control", socket, command @ ..] => match command::run(Path::new(socket), command) {
            Ok(text) => {
                print!("{text}");
                ExitCode::SUCCESS
            }
            Err(error) => fail(&[error.to_string()]),
        },
        ["spawner"] => match vmm::spawner::server::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&[format!("spawner: {error}")]),
        },
        ["tier"] => match vmm::process::sandbox::Sandbox::prepare() {
            Ok(sandbox) => {
                println!("{}", sandbox.tier());
                ExitCode::SUCCESS
            }
            Err(error) => fail(&[error.to_string()]),
        },
        ["--help" | "-h" | "help"] => {
            print!("{}", USAGE.replace("{CONTROL}\n", command::USAGE));
            ExitCode::SUCCESS
        }
        _ => fail(&["unknown arguments; see trine-vmm --help".into()]),
    }
}

fn run(file: &str, boot_timer: bool) -> ExitCode {
    vmm::process::standalone::run(Path::new(file), boot_timer)
        .map_or_else(|problems| fail(&problems), ExitCode::from)
}

fn fail(problems: &[String]) -> ExitCode {
    for problem in problems {
        eprintln!("trine-vmm: {problem}");
    }
    ExitCode::from(2)
}
