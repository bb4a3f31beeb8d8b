//! The `lorad` binary: picks the allocator and hands over to [`cli`].

mod cli;

use std::process::ExitCode;

// glibc returns every large block to the kernel; the page faults of taking it back cost norms and softmax 2.5 to 4 times
// their own time. mimalloc keeps what it has.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main()
}
